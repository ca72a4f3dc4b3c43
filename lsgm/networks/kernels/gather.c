/* Several processes on one host. */
#include "vectors.h"
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

/* The numbers `own` of every process, in `every` [world, count], through memory that they share: for each process a
 * line of 64 bytes with the turns that it took, then [2, world, capacity] numbers. Returns 0 if another one has not come
 * to this turn within so many milliseconds; the call can then be repeated. */
int64_t gather(char *memory, const float *own, int64_t count, int64_t capacity, int64_t rank, int64_t world,
               int64_t turn, int64_t milliseconds, float *every) {
    enum { LINE = 64, POLLS = 2000 };
    float *places = (float *)(memory + LINE * world) + turn % 2 * world * capacity;
    memcpy(places + rank * capacity, own, sizeof(float) * count);
    atomic_store_explicit((_Atomic int64_t *)(memory + LINE * rank), turn, memory_order_release);
    for (int64_t other = 0; other < world; other++) {
        _Atomic int64_t *turns = (_Atomic int64_t *)(memory + LINE * other);
        struct timespec start, now;
        clock_gettime(CLOCK_MONOTONIC, &start);
        for (int64_t polls = 1; atomic_load_explicit(turns, memory_order_acquire) < turn; polls++) {
            if (polls % POLLS) continue;
            sched_yield(); /* the other one may need this core */
            clock_gettime(CLOCK_MONOTONIC, &now);
            if ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 > milliseconds) return 0;
        }
        memcpy(every + other * count, places + other * capacity, sizeof(float) * count);
    }
    return 1;
}
