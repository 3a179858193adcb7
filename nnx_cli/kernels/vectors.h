/* What the C code of several kernels begins with: vectors of float32 as wide as this CPU's, and their exponentials. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define WIDTH 16 /* numbers in a vector */
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define BYTES (4 * WIDTH)
typedef float Vector __attribute__((vector_size(BYTES), may_alias));
typedef int32_t Integers __attribute__((vector_size(BYTES), may_alias));
typedef uint32_t Bits __attribute__((vector_size(BYTES), may_alias));

INLINE Vector all(float x) { return x - (Vector){0}; }

INLINE Vector chosen(Integers mask, Vector x) { return (Vector)(mask & (Integers)x); } /* else 0 */

INLINE Vector exponential(Vector x) /* of at most 0; 1e-38 where it would be less */
{
    const Vector least = all(-87.3f), shift = all(0x1.8p23f);
    const Integers low = x < least;
    x = chosen(~low, x) + chosen(low, least);
    const Vector shifted = x * 0x1.715476p0f + shift, n = shifted - shift;
    const Vector r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
    Vector y = all(1.9875691500e-4f) * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return (Vector)((Integers)y + (((Integers)shifted - (Integers)shift) << 23)) + (x - x); /* which is 0, or NaN */
}

INLINE float sum_of(Vector x)
{
    float sum = 0;
    UNROLL for (int i = 0; i < WIDTH; i++) sum += x[i];
    return sum;
}
