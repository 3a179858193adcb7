/* Matmul of a few rows in float32 with a matrix in int8, on an x86 CPU with AVX2 or more.

   Each row of x is rounded to 16 bits, 32767 times its `unit` at most. The sums of a piece of columns are exact, so that
   the result of a row depends neither on the rows beside it nor on the number of threads. */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_ROWS 8
#define PIECE 4096 /* columns whose sums no lane of 32 bits overflows with: 4096 * 127 * 32767 / 8 < 2^31 */
#define AHEAD 16384 /* bytes of the matrix that are brought into the second cache before they are needed */
#define UNROLL _Pragma("GCC unroll 8")

#ifdef __AVX512BW__
#define LANES 32 /* numbers of 16 bits in a vector */
typedef __m512i Vector;
#define zero() _mm512_setzero_si512()
#define load(x) _mm512_loadu_si512((const void *)(x))
#define widen(codes) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)(codes)))
#define add(a, b) _mm512_add_epi32(a, b)
#ifdef __AVX512VNNI__
#define add_products(sum, a, b) _mm512_dpwssd_epi32(sum, a, b)
#else
#define add_products(sum, a, b) add(sum, _mm512_madd_epi16(a, b))
#endif
static inline float total(Vector v) { return _mm512_reduce_add_ps(_mm512_cvtepi32_ps(v)); }
#else
#define LANES 16
typedef __m256i Vector;
#define zero() _mm256_setzero_si256()
#define load(x) _mm256_loadu_si256((const void *)(x))
#define widen(codes) _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(codes)))
#define add(a, b) _mm256_add_epi32(a, b)
#define add_products(sum, a, b) add(sum, _mm256_madd_epi16(a, b))
static inline float total(Vector v)
{
    const __m256 wide = _mm256_cvtepi32_ps(v);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(wide), _mm256_extractf128_ps(wide, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#endif

typedef struct {
    const int8_t *codes; /* (N, K) */
    const float *scale;  /* (N) */
    const int16_t *x;    /* (M, K) */
    float *y;            /* (M, N) */
    int64_t M, N, K, share, next;
    float unit[MOST_ROWS];
} Task;

static inline __attribute__((always_inline)) void multiply_row(const Task *task, int64_t n, const int M)
{
    const int64_t K = task->K, whole = K - K % (2 * LANES);
    const int8_t *codes = task->codes + n * K;
    float sum[MOST_ROWS] = {0};
    for (int64_t start = 0, end; start < whole; start = end) {
        Vector first[MOST_ROWS], second[MOST_ROWS];
        end = whole - start > PIECE ? start + PIECE : whole;
        UNROLL for (int m = 0; m < M; m++) first[m] = second[m] = zero();
        for (int64_t k = start; k < end; k += 2 * LANES) {
            const Vector a = widen(codes + k), b = widen(codes + k + LANES);
            _mm_prefetch((const char *)(codes + k + AHEAD), _MM_HINT_T1);
            UNROLL for (int m = 0; m < M; m++) {
                first[m] = add_products(first[m], a, load(task->x + m * K + k));
                second[m] = add_products(second[m], b, load(task->x + m * K + k + LANES));
            }
        }
        UNROLL for (int m = 0; m < M; m++) sum[m] += total(add(first[m], second[m]));
    }
    UNROLL for (int m = 0; m < M; m++) {
        for (int64_t k = whole; k < K; k++) sum[m] += (float)(codes[k] * task->x[m * K + k]);
        task->y[m * task->N + n] = sum[m] * task->unit[m] * task->scale[n];
    }
}

#define CASE(rows) case rows: for (; n < end; n++) multiply_row(task, n, rows); break;

/* Take shares of the matrix until none is left. */
static void work(void *shared)
{
    Task *task = shared;
    int64_t n;
    while ((n = __atomic_fetch_add(&task->next, task->share, __ATOMIC_RELAXED)) < task->N) {
        const int64_t end = task->N - n > task->share ? n + task->share : task->N;
        switch (task->M) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
    }
}

/* Round a row to 16 bits; returns what 1 stands for. */
static float quantize(const float *x, int64_t K, int16_t *codes)
{
    int32_t bits, top = 0x10000000; /* of magnitudes, which are in the order of their bits; at least 2.5e-29 */
    for (int64_t k = 0; k < K; k++) {
        memcpy(&bits, x + k, sizeof bits);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float peak;
    memcpy(&peak, &top, sizeof peak);
    const float factor = 32767 / peak;
    for (int64_t k = 0; k < K; k++) {
        const float shifted = x[k] * factor + 0x1.8p23f; /* rounded: its low bits are the integer */
        memcpy(&bits, &shifted, sizeof bits);
        codes[k] = (int16_t)bits;
    }
    return peak / 32767;
}

/* y = x (M, K) @ (codes (N, K) * scale (N)).T, M up to MOST_ROWS, by threads that take `share` rows of the matrix at a
   time; `parallel` is GOMP_parallel of the OpenMP that torch uses. Returns whether there was memory. */
int multiply(const int8_t *codes, const float *scale, const float *x, float *y, int64_t M, int64_t N, int64_t K,
             int64_t share, unsigned threads, void (*parallel)(void (*)(void *), void *, unsigned, unsigned))
{
    int16_t *rounded = malloc(M * K * sizeof *rounded + 1);
    if (!rounded) return 0;
    Task task = {codes, scale, rounded, y, M, N, K, share, 0, {0}};
    for (int64_t m = 0; m < M; m++) task.unit[m] = quantize(x + m * K, K, rounded + m * K);
    if (threads > 1) parallel(work, &task, threads, 0);
    else work(&task);
    free(rounded);
    return 1;
}
