/* From the plain loop to csrc/product.h, step by step: GFLOP/s of c (M, N) = a (M, T) b (T, N) on one core.
 *
 *   cc -O3 -std=c11 -ffp-contract=fast -Icsrc benchmarks/product_steps.c -o product_steps -lm && ./product_steps
 *
 * The sizes are those of the logits of a tile: 32 queries, 512 keys, heads of 64. b is the transposed keys.
 * csrc/README.md explains each step and shows what this prints.
 */

#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "settings.h"

#define real float

#define VECTOR_BYTES 16
#define VECTORS 2
#define TARGET
#define NAME(x) x##_plain
#include "product.h"
#undef VECTOR_BYTES
#undef VECTORS
#undef TARGET
#undef NAME

#if defined(__x86_64__)
#define VECTOR_BYTES 32
#define VECTORS 2
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2
#include "product.h"
#undef VECTOR_BYTES
#undef VECTORS
#undef TARGET
#undef NAME
#define VECTOR_BYTES 64
#define VECTORS 4
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma")))
#define NAME(x) x##_avx512
#include "product.h"
#undef VECTOR_BYTES
#undef VECTORS
#undef TARGET
#undef NAME
#endif

enum { M = 32, N = 512, T = 64 };

static float a[M * T], b[T * N], transposed[N * T], c[M * N], truth[M * N];

/* One sum at a time: each addition waits for the previous one. */
static void plain(void)
{
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            float sum = 0;
            for (int t = 0; t < T; t++)
                sum += a[i * T + t] * transposed[j * T + t];
            c[i * N + j] = sum;
        }
}

/* The same with the loops exchanged: the innermost runs along b and c, and the compiler vectorises it. */
static void along_memory(void)
{
    memset(c, 0, sizeof c);
    for (int i = 0; i < M; i++)
        for (int t = 0; t < T; t++)
            for (int j = 0; j < N; j++)
                c[i * N + j] += a[i * T + t] * b[t * N + j];
}

static void in_registers(void)
{
    product_plain(M, N, T, a, T, 1, b, N, c, N, 0);
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static void along_memory_avx512(void)
{
    memset(c, 0, sizeof c);
    for (int i = 0; i < M; i++)
        for (int t = 0; t < T; t++)
            for (int j = 0; j < N; j++)
                c[i * N + j] += a[i * T + t] * b[t * N + j];
}

static void in_registers_avx2(void)
{
    product_avx2(M, N, T, a, T, 1, b, N, c, N, 0);
}

static void in_registers_avx512(void)
{
    product_avx512(M, N, T, a, T, 1, b, N, c, N, 0);
}
#endif

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

static void measure(const char *name, void (*step)(void))
{
    double best = INFINITY;
    for (int round = 0; round < 30; round++) {
        double start = now();
        for (int repeat = 0; repeat < 40; repeat++)
            step();
        double seconds = (now() - start) / 40;
        best = seconds < best ? seconds : best;
    }
    double wrong = 0;
    for (int i = 0; i < M * N; i++)
        wrong = fmax(wrong, fabs(c[i] - truth[i]));
    printf("%-44s %7.1f GFLOP/s%s\n", name, 2.0 * M * N * T / best / 1e9, wrong < 1e-3 ? "" : "   WRONG");
}

int main(void)
{
    for (int i = 0; i < M * T; i++)
        a[i] = (float)(i % 17) / 17 - 0.5f;
    for (int t = 0; t < T; t++)
        for (int j = 0; j < N; j++)
            transposed[j * T + t] = b[t * N + j] = (float)((t * 31 + j * 7) % 23) / 23 - 0.5f;
    plain();
    memcpy(truth, c, sizeof c);
    measure("one sum at a time", plain);
    measure("along memory", along_memory);
    measure("in registers, 16-byte vectors", in_registers);
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        measure("along memory, 64-byte vectors", along_memory_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        measure("in registers, 32-byte vectors, fused", in_registers_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
        measure("in registers, 64-byte vectors, fused", in_registers_avx512);
#endif
    return 0;
}
