// Calls of new requests arranged: `cellc/arranging.py` in C++, array by array the same.
//
// Duty: number them, connect them, place what they make, write their records. Included by
// `native.cpp`.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

// Columns of the table (cellc/plan.py).
enum { CELL, MISSING, CHAIN, EDGES, RECORD, SUCCESSOR, NUM_SUCCESSORS, REQUEST, EVENT, COLUMNS };
enum { NOTHING, FIRST_ENTRY, FIRST_CALL, NUMBER, REGION };  // what is added to an entry

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
