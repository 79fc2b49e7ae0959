// The library that drives kernels: a thread pool a team, packed products, launches.
//
// Duty: compiled once a machine. In: a kernel's stages and a launch (runtime.h); out: rows in the
// arenas. Many rows of a step are cut into tiles, each run through all stages by one thread while
// it is in cache; few rows are run by all threads together, a share of the columns each. Steps, and
// the stages of few rows, wait for those before.
#include "gemm.h"
#include "runtime.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

using namespace cellc;

namespace {

Runtime runtime = {gemm<float, float>};  // others: cellc_use_f64, cellc_use_narrow

// ---- Waiting

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <class Done>
void spin(Done done) {
    for (int i = 0; !done(); ++i) i < 2000 ? pause() : (void)sched_yield();
}

// ---- The pool

typedef void (*Work)(void *, int64_t part, int64_t parts);

// A team never waits for a worker that has not come yet: workers join the work of a caller while it
// is open, and the caller closes it when there is nothing left to do. So a busy machine costs time,
// never a stall.
struct Pool {
    std::mutex lock;
    std::atomic<bool> taken{false};
    std::condition_variable wake;
    std::atomic<uint64_t> job{0};   // number * 256 + size of the team; size 0: stop
    std::atomic<uint64_t> door{0};  // number * 65536 + CLOSED + how many have joined
    std::atomic<uint64_t> left{0};
    std::atomic<int64_t> asleep{0};
    Work work = nullptr;
    void *context = nullptr;
    Scratch shared, shared_vectors;  // of tiles that all threads work on
    std::thread *threads[255] = {};
    int64_t count = 0;
    static constexpr uint64_t CLOSED = 32768;

    bool join(uint64_t number) {
        uint64_t seen = door.load(std::memory_order_acquire);
        do {
            if (seen / 65536 != number || (seen & CLOSED)) return false;
        } while (!door.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel));
        return true;
    }

    void loop(int64_t index, uint64_t seen) {
        for (;;) {
            for (int i = 0; i < 1500 && job.load(std::memory_order_acquire) == seen; ++i) pause();
            if (job.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> hold(lock);
                asleep.fetch_add(1);
                wake.wait(hold, [&] { return job.load() != seen; });
                asleep.fetch_sub(1);
            }
            seen = job.load(std::memory_order_acquire);
            const int64_t size = int64_t(seen & 255);
            if (size == 0) return;
            if (index >= size || !join(seen / 256)) continue;
            work(context, index, size);
            left.fetch_add(1, std::memory_order_acq_rel);
        }
    }

    void announce(int64_t size) {
        const uint64_t number = job.load() / 256 + 1;
        door.store(number * 65536);
        job.store(number * 256 + uint64_t(size));
        if (asleep.load() == 0) return;
        std::lock_guard<std::mutex> hold(lock);
        wake.notify_all();
    }

    // For one caller, until it gives it back. False where another one has it.
    bool take() { return !taken.exchange(true); }
    void give_back() { taken.store(false); }

    // Workers begin; the caller joins them in `end`, and may do something else before.
    void begin(int64_t size, Work what, void *with) {
        for (; count < size - 1; ++count)
            threads[count] = new std::thread(&Pool::loop, this, count + 1, job.load());
        work = what, context = with;
        left.store(0);
        announce(size);
    }

    void end(int64_t size) {
        work(context, 0, size);
        const uint64_t joined = door.fetch_or(CLOSED) & (CLOSED - 1);
        spin([&] { return left.load(std::memory_order_acquire) == joined; });
    }

    void stop() {
        spin([&] { return take(); });
        announce(0);
        for (; count > 0; --count) {
            threads[count - 1]->join();
            delete threads[count - 1];
        }
        give_back();
    }
};

// A pool a team (a worker of a model): two launches of one team never run together, those of two
// teams do. Never destroyed: their threads may outlive main.
constexpr int64_t TEAMS = 64;
Pool *pools = new Pool[TEAMS];
void forked() { pools = new Pool[TEAMS]; }  // the child has none of the threads
const int at_fork = pthread_atfork(nullptr, nullptr, forked);

// ---- Launches

thread_local Scratch scratch, vector_scratch;

struct Job {
    const Kernel *kernel;
    const Launch *launch;
    char *shared;  // scratch of a tile that all threads work on; null: each has tiles of its own
    char *shared_vectors;
    Pool *pool;  // null: the caller is alone
    int64_t threads, rows;
    int64_t began;  // nanoseconds of a steady clock, like `ended`
    std::atomic<int64_t> ended;
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<int64_t> claimed[256];  // the phase that each part is claimed for next

    void wait_for(int64_t count) {
        spin([&] { return done.load(std::memory_order_acquire) >= count; });
    }
};

inline int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

inline int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Of one row, all buffers but those along vectors
int64_t buffer_bytes(const Kernel &k) {
    int64_t total = 0;
    for (int64_t b = 0; b < k.num_buffers; ++b)
        if (k.vectors[b] < 0) total += padded(k.row_bytes[k.num_inputs + k.num_outputs + b]);
    return total;
}

// Of rows first, .., first + n - 1, the buffers along vectors
int64_t vector_bytes(const Kernel &k, const Launch &l, int64_t first, int64_t n) {
    int64_t total = 0;
    for (int64_t b = 0; b < k.num_buffers; ++b) {
        if (k.vectors[b] < 0) continue;
        const int32_t *offsets = l.operands()[k.vectors[b]].offsets + first;
        const int64_t bytes = k.row_bytes[k.num_inputs + k.num_outputs + b];
        for (int64_t r = 0; r < n; ++r) total += padded(bytes * (offsets[r + 1] - offsets[r]));
    }
    return total;
}

// Row addresses of a tile: of arenas by slot, of buffers in `buffers`
struct Pointers {
    const Kernel &kernel;
    const Launch &launch;
    char **rows;
    char ***at;
    Pointers(const Kernel &k, const Launch &l, char *memory) : kernel(k), launch(l) {
        at = reinterpret_cast<char ***>(memory);
        rows = reinterpret_cast<char **>(memory) + count(k);
    }
    static int64_t count(const Kernel &k) { return k.num_inputs + k.num_outputs + k.num_buffers; }
    static int64_t bytes(const Kernel &k) {
        return padded(count(k) * (1 + k.max_tile) * int64_t(sizeof(char *)));
    }

    Tile tile(int64_t first, int64_t n, char *buffers, char *vectors) const {
        const int64_t operands = kernel.num_inputs + kernel.num_outputs;
        for (int64_t x = 0; x < count(kernel); ++x) {
            char **to = at[x] = rows + x * kernel.max_tile;
            const int64_t bytes = kernel.row_bytes[x];
            const int64_t along = x < operands ? -1 : kernel.vectors[x - operands];
            if (along >= 0) {
                const int32_t *offsets = launch.operands()[along].offsets + first;
                for (int64_t r = 0; r < n; ++r) {
                    to[r] = vectors;
                    vectors += padded(bytes * (offsets[r + 1] - offsets[r]));
                }
            } else if (x >= operands) {
                for (int64_t r = 0; r < n; ++r, buffers += padded(bytes)) to[r] = buffers;
            } else if (bytes) {
                const Operand &o = launch.operands()[x];
                for (int64_t r = 0; r < n; ++r) to[r] = o.base + bytes * o.slots[first + r];
            }
        }
        uint8_t *bad = launch.bad ? launch.bad + first : nullptr;
        return {n, first, at, launch.params, launch.operands(), bad, &runtime};
    }
};

// Rows to a tile of a step of `n`: as many as may share scratch, a like number of tiles for every
// thread
int64_t tile_rows(const Kernel &k, int64_t n, int64_t threads) {
    const int64_t rounds = (n + k.max_tile * threads - 1) / (k.max_tile * threads);
    return (n + rounds * threads - 1) / (rounds * threads);
}

// Tiles are numbered through all steps; a tile begins when all of the steps before are done
void run_tiles(Job &job, int64_t parts) {
    const Kernel &k = *job.kernel;
    const Launch &l = *job.launch;
    char *memory = scratch.get(Pointers::bytes(k) + buffer_bytes(k) * k.max_tile);
    const Pointers pointers(k, l, memory);
    int64_t ticket = job.next.fetch_add(1), base = 0;
    for (int64_t s = 0; s < l.num_steps; ++s) {
        const int64_t begin = l.steps[s], n = l.steps[s + 1] - begin;
        if (n == 0) continue;
        const int64_t size = tile_rows(k, n, parts), tiles = (n + size - 1) / size;
        if (ticket < base + tiles) job.wait_for(base);
        for (; ticket < base + tiles; ticket = job.next.fetch_add(1)) {
            const int64_t first = (ticket - base) * size;
            const int64_t count = first + size < n ? size : n - first;
            char *vectors = vector_scratch.get(size_t(vector_bytes(k, l, begin + first, count)));
            const Tile tile =
                pointers.tile(begin + first, count, memory + Pointers::bytes(k), vectors);
            for (int64_t i = 0; i < k.num_stages; ++i) k.stages[i](tile, 0, 1);
            job.ended.store(nanoseconds(), std::memory_order_relaxed);
            job.done.fetch_add(1, std::memory_order_acq_rel);
        }
        base += tiles;
    }
}

// Every stage of a tile is a phase of `parts`; a thread takes its own part, whose weights are in
// its cache, and then those that no one has begun
void run_together(Job &job, int64_t part, int64_t parts) {
    const Kernel &k = *job.kernel;
    const Launch &l = *job.launch;
    const Pointers pointers(k, l, scratch.get(Pointers::bytes(k)));
    int64_t phase = 0;
    for (int64_t s = 0; s < l.num_steps; ++s) {
        for (int64_t first = l.steps[s]; first < l.steps[s + 1];
             first += k.max_tile, phase += k.num_stages) {
            if (job.done.load(std::memory_order_acquire) >= (phase + k.num_stages) * parts)
                continue;
            const int64_t n = l.steps[s + 1] - first;
            const int64_t count = n < k.max_tile ? n : k.max_tile;
            const Tile tile = pointers.tile(first, count, job.shared, job.shared_vectors);
            for (int64_t i = 0; i < k.num_stages; ++i) {
                for (int64_t j = 0; j < parts; ++j) {
                    const int64_t mine = (part + j) % parts;
                    int64_t open = phase + i;
                    if (job.claimed[mine].load(std::memory_order_relaxed) != open) continue;
                    if (!job.claimed[mine].compare_exchange_strong(open, open + 1,
                                                                   std::memory_order_acq_rel))
                        continue;
                    k.stages[i](tile, mine, parts);
                    job.ended.store(nanoseconds(), std::memory_order_relaxed);
                    job.done.fetch_add(1, std::memory_order_acq_rel);
                }
                job.wait_for((phase + i + 1) * parts);
            }
        }
    }
}

// Of any tile that threads work on together
size_t largest_vectors(const Kernel &k, const Launch &l) {
    int64_t most = 0;
    for (int64_t s = 0; s < l.num_steps; ++s)
        for (int64_t first = l.steps[s]; first < l.steps[s + 1]; first += k.max_tile) {
            const int64_t n = l.steps[s + 1] - first;
            const int64_t bytes = vector_bytes(k, l, first, n < k.max_tile ? n : k.max_tile);
            most = bytes > most ? bytes : most;
        }
    return size_t(most);
}

void work(void *context, int64_t part, int64_t parts) {
    Job &job = *static_cast<Job *>(context);
    if (job.shared && parts > 1)
        run_together(job, part, parts);
    else
        run_tiles(job, parts);
}

// Threads are worth their synchronisation (about 1 us a step) and waking them (10 us a launch) or
// not
int64_t threads_for(const Kernel &k, const Launch &l, int64_t rows) {
    const double row_ns = k.row_ns * double(rows),
                 read_ns = k.weight_bytes / 25. * double(l.num_steps);
    const double ns = row_ns > read_ns ? row_ns : read_ns;
    return ns < 15000. || ns < 3000. * double(l.num_steps) ? 1 : l.threads < 255 ? l.threads : 255;
}

}  // namespace

extern "C" {

// Other threads of the team begin with a launch, if any are worth it; `cellc_end` must follow.
void cellc_begin(const Kernel *kernel, const Launch *launch, Job **begun) {
    Job *job = *begun = new Job;
    job->kernel = kernel, job->launch = launch;
    job->ended = job->began = nanoseconds();
    job->rows = launch->steps[launch->num_steps];
    job->threads = threads_for(*kernel, *launch, job->rows);
    job->shared = job->shared_vectors = nullptr;
    Pool *pool = &pools[uint64_t(launch->team) % TEAMS];
    job->pool = job->threads > 1 && pool->take() ? pool : nullptr;
    if (job->pool == nullptr) return;
    for (int64_t i = 0; i < job->threads; ++i)
        job->claimed[i].store(0, std::memory_order_relaxed);
    const bool large =
        kernel->weight_bytes > 2e6;  // more than L2 holds: reading it once is worth more
    if (job->rows < (large ? 20 : 8) * job->threads * launch->num_steps) {
        job->shared = pool->shared.get(buffer_bytes(*kernel) * kernel->max_tile + 64);
        job->shared_vectors = pool->shared_vectors.get(largest_vectors(*kernel, *launch));
    }
    pool->begin(job->threads, work, job);
}

// Joins in until the launch is done. Whether any row is bad; `took`: nanoseconds since it began.
int64_t cellc_end(Job **begun, int64_t *took) {
    Job *job = *begun;
    if (job->pool) {
        job->pool->end(job->threads);
        job->pool->give_back();
    } else {
        work(job, 0, 1);
    }
    *took = job->ended.load() - job->began;
    const Launch *launch = job->launch;
    const bool bad = launch->bad && memchr(launch->bad, 1, size_t(job->rows));
    *begun = nullptr;
    delete job;
    return bad;
}

// Whether any row is bad
int64_t cellc_launch(const Kernel *kernel, const Launch *launch) {
    Job *job;
    int64_t took;
    cellc_begin(kernel, launch, &job);
    return cellc_end(&job, &took);
}

// `item`: bytes of what is summed
int64_t cellc_packed_count(int64_t k, int64_t n, int64_t item) {
    const int64_t lanes = VBYTES / item;
    return (n + lanes - 1) / lanes * lanes * k;
}
void cellc_pack_f32(const float *w, int64_t k, int64_t n, float *out) {
    pack<float>(w, k, n, out);
}
// Products of doubles are a library of their own (gemm_f64.cpp), built where a cell has some
void cellc_use_f64(decltype(Runtime::gemm_f64) gemm) { runtime.gemm_f64 = gemm; }
// and so are products of floats with narrower weights (gemm_narrow.cpp)
void cellc_use_narrow(decltype(Runtime::gemm_bf16) bf16, decltype(Runtime::gemm_i8) i8) {
    runtime.gemm_bf16 = bf16, runtime.gemm_i8 = i8;
}
void cellc_stop() {
    for (int64_t i = 0; i < TEAMS; ++i) pools[i].stop();
}
int64_t cellc_num_workers() {
    int64_t count = 0;
    for (int64_t i = 0; i < TEAMS; ++i) count += pools[i].count;
    return count;
}
int64_t cellc_panel_bytes() { return NV * VBYTES; }

void *cellc_alloc(int64_t bytes) {
    const size_t page = bytes >= (1 << 20) ? (1 << 21) : 4096,
                 size = (size_t(bytes) + page - 1) / page * page;
    void *memory = aligned_alloc(page, size ? size : page);
#ifdef MADV_HUGEPAGE
    if (memory && page > 4096) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return memory;
}
void cellc_free(void *memory) { free(memory); }
}
