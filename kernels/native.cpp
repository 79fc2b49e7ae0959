// Arithmetic on the table of calls: `cellc/arithmetic.py` in C++, entry by entry the same.
//
// Duty: blocks of plans placed; calls of new requests arranged (`arranging.h`); and two calls a launch,
// so that the caller gives arrays of the right size: `cellc_expand` follows the chains of the heads and
// changes nothing; `cellc_advance` fills the arrays and tells successors and requests. Between them the
// lengths that were found wait in memory of the thread. `cellc_look` in its place only looks. After the
// launch, `cellc_unlike` looks at its answers.
#include <stdint.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "arranging.h"

namespace {

constexpr int32_t SCHEDULED = 1 << 30, SEEN = -1, UNEXPECTED = INT32_MIN;
// Requests' blocks lie far apart, and kernels fill caches between launches: memory is asked for so many
// calls before it is read.
constexpr int64_t AHEAD = 8;

inline void soon(const void* memory) {
    __builtin_prefetch(memory, 1);
}

struct Chain {
    int64_t head;
    int32_t count;
};
thread_local std::vector<Chain> chains;  // longest first, else in order

}  // namespace

// In: table, heads, number of heads, most steps. Out: rows, steps, most calls that may be woken.
extern "C" void cellc_expand(const int32_t* table, const int64_t* heads, int64_t num_heads,
                             int64_t max_steps, int64_t* out) {
    chains.clear();
    int64_t rows = 0, longest = 0, woken = 0;
    for (int64_t i = 0; i < std::min(AHEAD, num_heads); ++i) soon(table + heads[i] * COLUMNS);
    for (int64_t i = 0; i < num_heads; ++i) {
        if (i + AHEAD < num_heads) soon(table + heads[i + AHEAD] * COLUMNS);
        const int32_t* row = table + heads[i] * COLUMNS;
        soon(row + 2 * COLUMNS), soon(table + row[RECORD]), soon(table + row[SUCCESSOR]);
        const int64_t length = std::min<int64_t>(row[CHAIN], max_steps);
        woken += row[NUM_SUCCESSORS] + 1;
        int32_t count = 1;
        for (row += COLUMNS; count < length && row[MISSING] == row[EDGES]; row += COLUMNS) {
            woken += row[NUM_SUCCESSORS];
            ++count;
        }
        chains.push_back({heads[i], count});
        rows += count;
        longest = std::max<int64_t>(longest, count);
    }
    if (rows > num_heads)
        std::stable_sort(chains.begin(), chains.end(),
                         [](const Chain& a, const Chain& b) { return a.count > b.count; });
    out[0] = rows, out[1] = longest, out[2] = woken;
}

struct Arrays {
    int32_t* table;
    int64_t* left;
    int64_t length, rows;  // entries of a record; calls
    int64_t* calls;        // [rows]
    int32_t* steps;        // [steps + 1]
    int32_t* slots;        // [length, rows]
    int64_t* ready;        // with room for what expand said
    int64_t* finished;     // [rows]
    int32_t *events, *answering;  // [rows]
};

namespace {

// Calls of the chains, step by step, and their slots
void look(const Arrays* a) {
    const int64_t rows = a->rows;
    int64_t at = 0, num_steps = 0;
    a->steps[0] = 0;
    for (int32_t step = 0; at < rows; ++step) {
        for (const Chain& chain : chains) {
            if (chain.count <= step) break;
            a->calls[at++] = chain.head + step;
        }
        a->steps[++num_steps] = static_cast<int32_t>(at);
    }
    for (int64_t i = 0; i < rows; ++i) {
        const int32_t* record = a->table + a->table[a->calls[i] * COLUMNS + RECORD];
        for (int64_t k = 0; k < a->length; ++k) a->slots[k * rows + i] = record[k];
    }
}

}  // namespace

// Of `Arrays`, calls, steps and slots alone; changes nothing.
extern "C" void cellc_look(const Arrays* a) {
    look(a);
}

// Out: calls that are ready, requests that are finished, calls with events, and the cell of all calls
// that are ready, or -1.
extern "C" void cellc_advance(const Arrays* a, int64_t* out) {
    int32_t* const table = a->table;
    const int64_t rows = a->rows;
    int64_t num_ready = 0, num_finished = 0, num_events = 0;
    look(a);
    for (int64_t i = 0; i < rows; ++i) {
        int32_t* row = table + a->calls[i] * COLUMNS;
        row[MISSING] = SCHEDULED;
        const int32_t request = row[REQUEST];
        if (--a->left[request] == 0) a->finished[num_finished++] = request;
        if (row[EVENT] > 0) {
            a->events[num_events] = row[EVENT];
            a->answering[num_events++] = request;
        }
    }
    for (const Chain& chain : chains) {  // the calls after those of the chains
        const int64_t end = chain.head + chain.count - 1;
        int32_t* row = table + end * COLUMNS;
        if (row[CHAIN] <= 1) continue;
        row += COLUMNS;
        if ((row[MISSING] -= row[EDGES]) == 0) a->ready[num_ready++] = end + 1;
    }
    const int64_t before = num_ready;
    for (int64_t i = 0; i < rows; ++i) {
        const int32_t* row = table + a->calls[i] * COLUMNS;
        for (int32_t k = 0; k < row[NUM_SUCCESSORS]; ++k)
            --table[static_cast<int64_t>(table[row[SUCCESSOR] + k]) * COLUMNS + MISSING];
    }
    for (int64_t i = 0; i < rows; ++i) {  // each once, in order of first appearance
        const int32_t* row = table + a->calls[i] * COLUMNS;
        for (int32_t k = 0; k < row[NUM_SUCCESSORS]; ++k) {
            const int64_t call = table[row[SUCCESSOR] + k];
            int32_t& missing = table[call * COLUMNS + MISSING];
            if (missing == 0) missing = SEEN, a->ready[num_ready++] = call;
        }
    }
    for (int64_t i = before; i < num_ready; ++i) table[a->ready[i] * COLUMNS + MISSING] = 0;
    std::sort(a->finished, a->finished + num_finished);
    int64_t cell = num_ready ? table[a->ready[0] * COLUMNS + CELL] : -1;
    for (int64_t i = 1; i < num_ready; ++i)
        if (table[a->ready[i] * COLUMNS + CELL] != cell) cell = -1;
    out[0] = num_ready, out[1] = num_finished, out[2] = num_events, out[3] = cell;
}

struct Rows {
    const char* first;
    int64_t kind;  // NUMBER_KINDS, or 0
};
struct Event {
    int32_t type, slot, expected, number;
};

constexpr int64_t SIZES[] = {0, 1, 4, 8, 4, 8};  // of kinds

static bool is_expected(const Rows* places, const Event& event) {
    if (event.type < 0 || event.expected == UNEXPECTED) return false;  // whatever it holds
    const Rows& rows = places[event.type];
    const int64_t slot = event.slot;
    switch (rows.kind) {
        case 1: return reinterpret_cast<const uint8_t*>(rows.first)[slot] == event.expected;
        case 2: return reinterpret_cast<const int32_t*>(rows.first)[slot] == event.expected;
        case 3: return reinterpret_cast<const int64_t*>(rows.first)[slot] == event.expected;
        case 4: return double(reinterpret_cast<const float*>(rows.first)[slot]) == event.expected;
        case 5: return reinterpret_cast<const double*>(rows.first)[slot] == event.expected;
        default: return false;
    }
}

static void ask_for(const Rows* places, const int32_t* entries) {
    const auto& event = *reinterpret_cast<const Event*>(entries + 1);
    if (event.type < 0 || !places[event.type].kind) return;
    soon(places[event.type].first + event.slot * SIZES[places[event.type].kind]);
}

// In: table, entries where events of calls begin, how many, rows of each type. Out: positions of those
// that hold anything but expected answers. Returns how many.
extern "C" int64_t cellc_unlike(const int32_t* table, const int32_t* events, int64_t count,
                                const Rows* places, int64_t* out) {
    int64_t found = 0;
    for (int64_t i = 0; i < std::min(2 * AHEAD, count); ++i) soon(table + events[i]);
    for (int64_t i = 0; i < count; ++i) {
        if (i + 2 * AHEAD < count) soon(table + events[i + 2 * AHEAD]);
        if (i + AHEAD < count) ask_for(places, table + events[i + AHEAD]);
        const int32_t* entries = table + events[i];
        const auto* event = reinterpret_cast<const Event*>(entries + 1);
        if (!std::all_of(event, event + entries[0], [&](const Event& e) { return is_expected(places, e); }))
            out[found++] = i;
    }
    return found;
}

// In: table, plans, the first call of each, `Plan.addresses` of each, what is added, [plans, kinds].
extern "C" void cellc_place(int32_t* table, int64_t plans, const int64_t* first_calls,
                            const int64_t* addresses, const int32_t* added, int64_t kinds) {
    for (int64_t i = 0; i < plans; ++i, addresses += 8, added += kinds) {
        int32_t* to = table + first_calls[i] * COLUMNS;
        const auto* entries = reinterpret_cast<const int32_t*>(addresses[0]);
        const int64_t count = addresses[1], records = addresses[3], told = addresses[6];
        const auto* second = reinterpret_cast<const int32_t*>(addresses[2]);
        if (records < 0) {  // a block, and the kind of each entry
            for (int64_t k = 0; k < count; ++k) to[k] = entries[k] + added[second[k]];
            continue;
        }
        const auto* base = reinterpret_cast<const int32_t*>(addresses[4]);
        const auto* successors = reinterpret_cast<const int32_t*>(addresses[5]);
        const int32_t types = static_cast<int32_t>(addresses[7]);
        const int32_t record_at = added[FIRST_ENTRY] + static_cast<int32_t>(count * COLUMNS);
        const int32_t told_at = record_at + static_cast<int32_t>(records);
        for (int64_t k = 0; k < count; ++k, to += COLUMNS, entries += COLUMNS) {
            std::copy(entries, entries + COLUMNS, to);
            to[RECORD] += record_at, to[SUCCESSOR] += told_at, to[REQUEST] += added[NUMBER];
        }
        for (int64_t k = 0; k < records; ++k) {
            const int32_t type = base[k];
            *to++ = second[k] + (type < types ? added[REGION + type] : type == types ? record_at : 0);
        }
        for (int64_t k = 0; k < told; ++k) *to++ = successors[k] + added[FIRST_CALL];
        std::fill(to, to + (COLUMNS - (records + told) % COLUMNS) % COLUMNS, 0);
    }
}

// In: pieces of memory, each (to, from, bytes).
extern "C" void cellc_copy(const int64_t* piece, int64_t count) {
    for (const int64_t* end = piece + 3 * count; piece != end; piece += 3)
        std::memcpy(reinterpret_cast<void*>(piece[0]), reinterpret_cast<void*>(piece[1]), piece[2]);
}

// In: children [nodes, width], -1 where there is none. Out, where they are those of a tree whose
// children come first: how many each node has, how many nodes read each, all in a row. Returns the
// root; -1 where it is anything else.
extern "C" int64_t cellc_tree(const int64_t* children, int64_t nodes, int64_t width, int64_t* out) {
    int64_t *const counts = out, *const readers = out + nodes, *const flat = out + 2 * nodes;
    std::fill(out, flat, 0);
    int64_t edges = 0;
    for (int64_t i = 0; i < nodes; ++i) {
        for (int64_t k = 0; k < width; ++k) {
            const int64_t child = children[i * width + k];
            if (child == -1) continue;
            if (child < 0 || child >= i || readers[child]++) return -1;
            flat[edges++] = child;
        }
        counts[i] = edges;
    }
    if (edges != nodes - 1) return -1;
    for (int64_t i = nodes - 1; i > 0; --i) counts[i] -= counts[i - 1];
    return nodes - 1;  // children come first
}
