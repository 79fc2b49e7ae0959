// Arithmetic on the table of calls: `cellc/arithmetic.py` in C++, entry by entry the same.
//
// Duty: blocks of plans placed; calls of new requests arranged; and two calls a launch, so that the caller gives arrays of the right
// size: `cellc_expand` follows the chains of the heads and changes nothing; `cellc_advance` fills
// the arrays and tells successors and requests. Between them the lengths that were found wait in
// memory of the thread.
#include <stdint.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

// Columns of the table (cellc/plan.py).
enum { CELL, MISSING, CHAIN, EDGES, RECORD, SUCCESSOR, NUM_SUCCESSORS, REQUEST, EVENT, COLUMNS };
enum { NOTHING, FIRST_ENTRY, FIRST_CALL, NUMBER, REGION };  // what is added to an entry
constexpr int32_t SCHEDULED = 1 << 30, SEEN = -1;

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
    for (int64_t i = 0; i < num_heads; ++i) {
        const int32_t* row = table + heads[i] * COLUMNS;
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

// Out: calls that are ready, requests that are finished, calls with events.
extern "C" void cellc_advance(const Arrays* a, int64_t* out) {
    int32_t* const table = a->table;
    const int64_t rows = a->rows;
    int64_t at = 0, num_ready = 0, num_finished = 0, num_events = 0, num_steps = 0;
    a->steps[0] = 0;
    for (int32_t step = 0; at < rows; ++step) {
        for (const Chain& chain : chains) {
            if (chain.count <= step) break;
            a->calls[at++] = chain.head + step;
        }
        a->steps[++num_steps] = static_cast<int32_t>(at);
    }
    for (int64_t i = 0; i < rows; ++i) {
        int32_t* row = table + a->calls[i] * COLUMNS;
        const int32_t* record = table + row[RECORD];
        for (int64_t k = 0; k < a->length; ++k) a->slots[k * rows + i] = record[k];
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
    out[0] = num_ready, out[1] = num_finished, out[2] = num_events;
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

struct Column {
    const int64_t *values, *offsets;  // what each call reads: one, or those from its offset on
};
struct Group {
    int64_t calls, inputs, outputs, length;  // of a record
    const int64_t* owners;
    const Column* columns;
    const int64_t* const* made;
    const int64_t* types;  // of outputs
};
struct Wiring {
    int64_t groups, requests, values, row_types, keeps;
    const Group* group;
    const int64_t* reads;
    int64_t *types, *slots;
    const int64_t* owned;
    int64_t* taken;  // [row types, requests]
};
struct Out {
    int32_t *table, *records, *bases, *successors, *ready;
    int64_t *call_starts, *record_starts, *successor_starts, *ready_starts;  // [requests + 1]
    int64_t *producer, *depths;
};

namespace {

// Of the calls of all requests
struct Arranger {
    const Wiring& w;
    const Out& out;
    std::vector<std::vector<int64_t>> numbers;  // of a group's calls
    std::vector<int64_t> group_of, owner_of, told_at;

    int64_t read_by(const Column& c, int64_t call) const {
        return c.offsets ? c.offsets[call + 1] - c.offsets[call] : 1;
    }
    const int64_t* values_of(const Column& c, int64_t call) const {
        return c.values + (c.offsets ? c.offsets[call] : call);
    }
    int32_t* row(int64_t call) const { return out.table + call * COLUMNS; }

    // visit(producing call, reading call): of every read of a made value
    template <class Visit>
    void edges(Visit visit) const {
        for (int64_t g = 0; g < w.groups; ++g)
            for (int64_t i = 0; i < w.group[g].inputs; ++i) {
                const Column& column = w.group[g].columns[i];
                for (int64_t j = 0; j < w.group[g].calls; ++j) {
                    const int64_t* values = values_of(column, j);
                    for (int64_t k = read_by(column, j); k > 0; --k, ++values)
                        if (out.producer[*values] >= 0) visit(out.producer[*values], numbers[g][j]);
                }
            }
    }
    bool chained(int64_t source, int64_t target) const {
        return source == target - 1 && group_of[source] == group_of[target];
    }

    void number() {
        std::vector<int64_t> first(w.requests * w.groups + 1);  // request by request
        for (int64_t g = 0; g < w.groups; ++g)
            for (int64_t j = 0; j < w.group[g].calls; ++j)
                ++first[w.group[g].owners[j] * w.groups + g + 1];
        for (size_t i = 1; i < first.size(); ++i) first[i] += first[i - 1];
        for (int64_t r = 0; r <= w.requests; ++r) out.call_starts[r] = first[r * w.groups];
        const int64_t total = first.back();
        group_of.resize(total), owner_of.resize(total), numbers.resize(w.groups);
        std::fill(out.producer, out.producer + w.values, -1);
        for (int64_t g = 0; g < w.groups; ++g) {
            const Group& group = w.group[g];
            numbers[g].resize(group.calls);
            for (int64_t j = 0; j < group.calls; ++j) {
                const int64_t call = numbers[g][j] = first[group.owners[j] * w.groups + g]++;
                group_of[call] = g, owner_of[call] = group.owners[j];
            }
            for (int64_t o = 0; o < group.outputs; ++o)
                for (int64_t j = 0; j < group.calls; ++j) {
                    out.producer[group.made[o][j]] = numbers[g][j];
                    w.types[group.made[o][j]] = group.types[o];
                }
        }
    }

    // Whom calls tell, chains aside; returns how many calls wait in no circle
    int64_t connect() {
        const int64_t total = group_of.size();
        told_at.assign(total + 1, 0);
        edges([&](int64_t source, int64_t target) {
            ++row(target)[MISSING];
            if (chained(source, target))
                ++row(target)[EDGES];
            else
                ++told_at[source + 1];
        });
        for (int64_t i = 0; i < total; ++i) told_at[i + 1] += told_at[i];
        std::vector<int64_t> at(told_at.begin(), told_at.end() - 1), left(total), ready, next;
        edges([&](int64_t source, int64_t target) {
            if (!chained(source, target)) out.successors[at[source]++] = static_cast<int32_t>(target);
        });
        int64_t num_ready = 0, seen = 0;
        for (int64_t r = 0; r < w.requests; ++r) {
            out.ready_starts[r] = num_ready;
            out.successor_starts[r] = told_at[out.call_starts[r]];
            for (int64_t call = out.call_starts[r]; call < out.call_starts[r + 1]; ++call) {
                row(call)[NUM_SUCCESSORS] = static_cast<int32_t>(told_at[call + 1] - told_at[call]);
                row(call)[SUCCESSOR] = static_cast<int32_t>(told_at[call] - out.successor_starts[r]);
                left[call] = row(call)[MISSING];
                if (left[call]) continue;
                ready.push_back(call);
                out.ready[num_ready++] = static_cast<int32_t>(call - out.call_starts[r]);
            }
        }
        out.ready_starts[w.requests] = num_ready, out.successor_starts[w.requests] = told_at[total];
        for (int64_t call = total - 1; call >= 0; --call) {
            const bool goes_on = call + 1 < total && row(call + 1)[EDGES] > 0;
            row(call)[CHAIN] = goes_on ? row(call + 1)[CHAIN] + 1 : 1;
        }
        for (int64_t level = 0; !ready.empty(); ++level) {
            next.clear();
            for (const int64_t call : ready) {
                ++seen;
                out.depths[group_of[call]] = level;
                for (int64_t k = told_at[call]; k < told_at[call + 1]; ++k)
                    if (--left[out.successors[k]] == 0) next.push_back(out.successors[k]);
                if (row(call)[CHAIN] > 1 && (left[call + 1] -= row(call + 1)[EDGES]) == 0)
                    next.push_back(call + 1);
            }
            ready.swap(next);
        }
        for (int64_t k = 0; k < told_at[total]; ++k)
            out.successors[k] -= static_cast<int32_t>(out.call_starts[owner_of[out.successors[k]]]);
        return seen;
    }

    // Slots of what calls `from` to `to` of a group make, which are those of one request
    void place(const Group& group, int64_t g, int64_t from, int64_t to) const {
        std::vector<char> transient(to - from);
        for (int64_t o = 0; o < group.outputs; ++o) {
            const int64_t* made = group.made[o];
            int64_t chains = 0;
            bool some = false;
            for (int64_t j = from; j < to; ++j) {
                const int32_t chain = row(numbers[g][j])[CHAIN];
                chains += j == from || chain != row(numbers[g][j - 1])[CHAIN] - 1;
                int64_t passing = 0;
                if (j + 1 < group.calls)
                    for (int64_t i = 0; i < group.inputs; ++i)
                        passing += !group.columns[i].offsets && group.columns[i].values[j + 1] == made[j];
                const int64_t reads = w.reads[made[j]];
                some |= transient[j - from] = !w.keeps && passing == reads && !(chain == 1 && reads > 0);
            }
            int64_t& taken = w.taken[group.types[o] * w.requests + group.owners[from]];
            const int64_t pairs = taken;
            if (some) taken += 2 * chains;
            int64_t number = -1;
            for (int64_t j = from; j < to; ++j) {
                number += j == from ||
                          row(numbers[g][j])[CHAIN] != row(numbers[g][j - 1])[CHAIN] - 1;
                w.slots[made[j]] = transient[j - from] ? pairs + 2 * number + (j - from) % 2 : taken++;
            }
        }
    }

    void write(int64_t at, int64_t slot, int64_t base) const {
        out.records[at] = static_cast<int32_t>(slot), out.bases[at] = static_cast<int32_t>(base);
    }
    void write_value(int64_t at, int64_t value) const {
        write(at, w.slots[value], w.owned[value] == 1 ? w.types[value] : w.row_types + 1);
    }

    // A request's records lie group by group, then the vectors of ragged inputs
    void record() const {
        std::vector<int64_t> tail(w.requests), vectors(w.requests), at(w.requests);
        for (int64_t g = 0; g < w.groups; ++g)
            for (int64_t j = 0; j < w.group[g].calls; ++j) {
                const int64_t r = w.group[g].owners[j];
                tail[r] += w.group[g].length;
                for (int64_t i = 0; i < w.group[g].inputs; ++i)
                    if (w.group[g].columns[i].offsets) vectors[r] += read_by(w.group[g].columns[i], j);
            }
        out.record_starts[0] = 0;
        for (int64_t r = 0; r < w.requests; ++r) {
            at[r] = out.record_starts[r];
            out.record_starts[r + 1] = out.record_starts[r] + tail[r] + vectors[r];
        }
        std::vector<int64_t> places;
        for (int64_t g = 0; g < w.groups; ++g) {
            const Group& group = w.group[g];
            places.resize(group.calls);
            for (int64_t j = 0; j < group.calls; ++j) {
                const int64_t r = group.owners[j];
                places[j] = at[r], at[r] += group.length;
                row(numbers[g][j])[RECORD] = static_cast<int32_t>(places[j] - out.record_starts[r]);
            }
            for (int64_t i = 0; i < group.inputs; ++i)
                for (int64_t j = 0; j < group.calls; ++j) {
                    const Column& column = group.columns[i];
                    const int64_t* values = values_of(column, j);
                    if (!column.offsets) {
                        write_value(places[j]++, *values);
                        continue;
                    }
                    const int64_t size = read_by(column, j), r = group.owners[j];
                    write(places[j]++, tail[r], w.row_types);
                    write(places[j]++, size, w.row_types + 1);
                    for (int64_t k = 0; k < size; ++k)
                        write_value(out.record_starts[r] + tail[r] + k, values[k]);
                    tail[r] += size;
                }
            for (int64_t o = 0; o < group.outputs; ++o)
                for (int64_t j = 0; j < group.calls; ++j) write_value(places[j]++, group.made[o][j]);
        }
    }

    int64_t run() {
        number();
        const int64_t seen = connect();
        for (int64_t g = 0; g < w.groups; ++g) {
            const Group& group = w.group[g];
            for (int64_t from = 0, to; from < group.calls; from = to) {
                for (to = from + 1; to < group.calls && group.owners[to] == group.owners[from];) ++to;
                place(group, g, from, to);
            }
        }
        record();
        return seen;
    }
};

}  // namespace

// `cellc/arranging.py`, array by array. Out: table and depths zero before. Returns how many calls wait
// for others in no circle.
extern "C" int64_t cellc_arrange(const Wiring* wiring, const Out* out) {
    return Arranger{*wiring, *out, {}, {}, {}, {}}.run();
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
