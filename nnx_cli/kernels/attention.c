/* Causal softmax attention in float32 with dropout of its probabilities, and its gradients, on a CPU.

   A head of a sequence is a piece of work. Scores of BLOCK queries are held at a time, those of later keys are not
   computed. Whether a probability is dropped is a hash of (seed, head, query, key), which both passes compute, so that
   results depend neither on the number of threads nor on which of them takes what. */

#define BLOCK 32                    /* queries */
#define TILE (WIDTH == 16 ? 8 : 4) /* rows of a product that are held in registers */

typedef struct {
    const float *q, *k, *v;    /* (B, H, T, K), (B, G, T, K), (B, G, T, V), of these strides but for the last, 1 */
    const int64_t *strides;    /* of q, k and v: batch, head, position */
    const float *y, *gradient; /* (B, T, H, V) */
    float *out;                /* y or the gradient of q (B, T, H, K) */
    float *dk, *dv;            /* (B, T, H, K) and (B, T, H, V), of every query head */
    float *lse;                /* (B, H, T), logarithms of the sums of exponentials */
    int64_t B, H, G, T, K, V, next;
    float scale, factor;       /* factor: of what is kept */
    uint32_t seed[2], dropped; /* of 2^32 */
    int failed;
} Task;

INLINE int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t padded(int64_t T) { return rounded_up(T, WIDTH) + WIDTH; } /* no power of two: rows share no cache set */

INLINE uint32_t mixed(uint32_t x) /* by Ellis's constants: https://nullprogram.com/blog/2018/07/31/ */
{
    x = (x ^ x >> 16) * 0x7feb352d;
    x = (x ^ x >> 15) * 0x846ca68b;
    return x ^ x >> 16;
}

/* All ones in the lanes that are kept: of the keys `lane` of one row. */
INLINE Integers kept(Integers lane, uint32_t row, uint32_t dropped)
{
    Bits x = (Bits)lane * 0x9e3779b1 + row;
    x = (x ^ x >> 16) * 0x7feb352d;
    x = (x ^ x >> 15) * 0x846ca68b;
    return x >= dropped;
}

/* c (+)= a (TILE, L) @ b (L, N vectors), with strides of a's rows and columns, and of the rows of b and c. */
INLINE void tile(const int N, float *c, int64_t cs, const float *a, int64_t rows, int64_t columns, const float *b,
                 int64_t bs, int64_t L, int add)
{
    Vector sum[TILE][2];
    UNROLL for (int m = 0; m < TILE; m++)
        UNROLL for (int n = 0; n < N; n++) sum[m][n] = add ? *(Vector *)(c + m * cs + n * WIDTH) : (Vector){0};
    for (int64_t l = 0; l < L; l++, a += columns, b += bs) {
        Vector right[2];
        UNROLL for (int n = 0; n < N; n++) right[n] = *(const Vector *)(b + n * WIDTH);
        UNROLL for (int m = 0; m < TILE; m++)
            UNROLL for (int n = 0; n < N; n++) sum[m][n] += a[m * rows] * right[n];
    }
    UNROLL for (int m = 0; m < TILE; m++)
        UNROLL for (int n = 0; n < N; n++) *(Vector *)(c + m * cs + n * WIDTH) = sum[m][n];
}

/* c (+)= a (M, L) @ b (L, N): M in whole tiles, N in whole vectors. */
static void product(int64_t M, int64_t N, int64_t L, float *c, int64_t cs, const float *a, int64_t rows,
                    int64_t columns, const float *b, int64_t bs, int add)
{
    int64_t n = 0;
    for (; n + 2 * WIDTH <= N; n += 2 * WIDTH)
        for (int64_t m = 0; m < M; m += TILE)
            tile(2, c + m * cs + n, cs, a + m * rows, rows, columns, b + n, bs, L, add);
    for (; n < N; n += WIDTH)
        for (int64_t m = 0; m < M; m += TILE)
            tile(1, c + m * cs + n, cs, a + m * rows, rows, columns, b + n, bs, L, add);
}

/* `rows` rows of x times `factor`, then zeros, to (up to, stride). */
static void pack(float *to, int64_t stride, int64_t up_to, const float *x, int64_t xs, int64_t rows, int64_t K,
                 float factor)
{
    memset(to, 0, up_to * stride * sizeof *to);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t d = 0; d < K; d++) to[t * stride + d] = x[t * xs + d] * factor;
}

static void transpose(float *to, int64_t stride, const float *x, int64_t xs, int64_t T, int64_t K)
{
    memset(to, 0, K * stride * sizeof *to);
    for (int64_t first = 0; first < T; first += WIDTH)
        for (int64_t d = 0; d < K; d++)
            for (int64_t t = first; t < T && t < first + WIDTH; t++) to[d * stride + t] = x[t * xs + d];
}

typedef struct {
    int64_t T, K, V, Tp, Kp, Vp; /* the last three in whole vectors */
    const float *q, *k, *v;
    int64_t qs, ks, vs; /* strides of positions */
    int64_t y, dq;      /* where its parts of y and of the gradient of q begin */
    uint32_t key;       /* of the hash */
    Integers lane;
} Head;

static Head head_of(const Task *task, int64_t head)
{
    const int64_t b = head / task->H, h = head % task->H, g = h / (task->H / task->G), *s = task->strides;
    Head it = {task->T, task->K, task->V, padded(task->T), rounded_up(task->K, WIDTH), rounded_up(task->V, WIDTH),
               task->q + b * s[0] + h * s[1], task->k + b * s[3] + g * s[4], task->v + b * s[6] + g * s[7],
               s[2], s[5], s[8], (b * task->T * task->H + h) * task->V, (b * task->T * task->H + h) * task->K,
               mixed(mixed(task->seed[0] + (uint32_t)head) ^ task->seed[1]), {0}};
    for (int i = 0; i < WIDTH; i++) it.lane[i] = i;
    return it;
}

/* Keys that a block of queries from `first` on needs, in whole vectors. */
INLINE int64_t keys_of(const Head *it, int64_t first)
{
    return first + BLOCK < it->T ? rounded_up(first + BLOCK, WIDTH) : rounded_up(it->T, WIDTH);
}

static void forward(const Task *task, int64_t head, float *scratch)
{
    const Head it = head_of(task, head);
    const int64_t T = it.T, K = it.K, V = it.V, Tp = it.Tp, Kp = it.Kp, Vp = it.Vp, step = task->H * V;
    float *kt = scratch, *v = kt + K * Tp, *s = v + Tp * Vp, *q = s + BLOCK * Tp, *y = q + BLOCK * Kp;
    transpose(kt, Tp, it.k, it.ks, T, K);
    pack(v, Vp, Tp, it.v, it.vs, T, V, 1);
    for (int64_t first = 0; first < T; first += BLOCK) {
        const int64_t n = keys_of(&it, first), rows = T - first < BLOCK ? T - first : BLOCK;
        float factor[BLOCK];
        pack(q, Kp, BLOCK, it.q + first * it.qs, it.qs, rows, K, task->scale);
        product(BLOCK, n, K, s, Tp, q, Kp, 1, kt, Tp, 0);
        for (int64_t row = 0; row < rows; row++) {
            const int64_t i = first + row, end = rounded_up(i + 1, WIDTH);
            const uint32_t key = mixed(it.key + (uint32_t)i);
            float *x = s + row * Tp, top = -INFINITY;
            for (int64_t j = 0; j <= i; j++) top = x[j] > top ? x[j] : top;
            Vector sum = {0};
            for (int64_t j = 0; j < end; j += WIDTH) {
                const Integers lane = it.lane + (int32_t)j;
                const Vector p = chosen(lane <= (int32_t)i, exponential(*(Vector *)(x + j) - top));
                sum += p;
                *(Vector *)(x + j) = chosen(kept(lane, key, task->dropped), p);
            }
            memset(x + end, 0, (n - end) * sizeof *x);
            const float total = sum_of(sum);
            factor[row] = task->factor / total;
            task->lse[head * T + i] = top + logf(total);
        }
        product(BLOCK, Vp, n, y, Vp, s, Tp, 1, v, Vp, 0);
        for (int64_t row = 0; row < rows; row++) {
            float *to = task->out + it.y + (first + row) * step;
            for (int64_t d = 0; d < V; d++) to[d] = y[row * Vp + d] * factor[row];
        }
    }
}

static void backward(const Task *task, int64_t head, float *scratch)
{
    const Head it = head_of(task, head);
    const int64_t T = it.T, K = it.K, V = it.V, Tp = it.Tp, Kp = it.Kp, Vp = it.Vp, step = task->H * V;
    float *kt = scratch, *vt = kt + K * Tp, *k = vt + V * Tp, *dk = k + Tp * Kp, *dv = dk + Tp * Kp;
    float *s = dv + Tp * Vp, *ds = s + BLOCK * Tp, *q = ds + BLOCK * Tp, *dq = q + BLOCK * Kp, *g = dq + BLOCK * Kp;
    transpose(kt, Tp, it.k, it.ks, T, K);
    transpose(vt, Tp, it.v, it.vs, T, V);
    pack(k, Kp, Tp, it.k, it.ks, T, K, 1);
    memset(dk, 0, Tp * (Kp + Vp) * sizeof *dk);
    for (int64_t first = 0; first < T; first += BLOCK) {
        const int64_t n = keys_of(&it, first), rows = T - first < BLOCK ? T - first : BLOCK;
        const int64_t start = it.y + first * step;
        pack(q, Kp, BLOCK, it.q + first * it.qs, it.qs, rows, K, task->scale);
        pack(g, Vp, BLOCK, task->gradient + start, step, rows, V, 1);
        product(BLOCK, n, K, s, Tp, q, Kp, 1, kt, Tp, 0);
        product(BLOCK, n, V, ds, Tp, g, Vp, 1, vt, Tp, 0);
        for (int64_t row = 0; row < BLOCK; row++) {
            const int64_t i = first + row, end = row < rows ? rounded_up(i + 1, WIDTH) : 0;
            float *x = s + row * Tp, *dx = ds + row * Tp, delta = 0, lse = 0;
            if (row < rows) {
                for (int64_t d = 0; d < V; d++) delta += task->y[start + row * step + d] * g[row * Vp + d];
                lse = task->lse[head * T + i];
            }
            const uint32_t key = mixed(it.key + (uint32_t)i);
            for (int64_t j = 0; j < end; j += WIDTH) {
                const Integers lane = it.lane + (int32_t)j, keep = kept(lane, key, task->dropped);
                const Vector p = chosen(lane <= (int32_t)i, exponential(*(Vector *)(x + j) - lse));
                const Vector dp = chosen(keep, *(Vector *)(dx + j) * task->factor);
                *(Vector *)(x + j) = chosen(keep, p * task->factor);
                *(Vector *)(dx + j) = p * (dp - delta);
            }
            memset(x + end, 0, (n - end) * sizeof *x);
            memset(dx + end, 0, (n - end) * sizeof *dx);
        }
        product(BLOCK, Kp, n, dq, Kp, ds, Tp, 1, k, Kp, 0);
        product(n, Vp, BLOCK, dv, Vp, s, 1, Tp, g, Vp, 1);
        product(n, Kp, BLOCK, dk, Kp, ds, 1, Tp, q, Kp, 1);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t d = 0; d < K; d++)
                task->out[it.dq + (first + row) * task->H * K + d] = dq[row * Kp + d] * task->scale;
    }
    for (int64_t t = 0; t < T; t++) {
        memcpy(task->dk + it.dq + t * task->H * K, dk + t * Kp, K * sizeof *dk);
        memcpy(task->dv + it.y + t * step, dv + t * Vp, V * sizeof *dv);
    }
}

/* Take heads until none is left. */
static void work(void *shared)
{
    Task *task = shared;
    const int64_t Tp = padded(task->T), width = rounded_up(task->K > task->V ? task->K : task->V, WIDTH);
    float *scratch = aligned_alloc(BYTES, (5 * Tp * width + 2 * BLOCK * Tp + 3 * BLOCK * width) * sizeof *scratch);
    if (!scratch) {
        __atomic_store_n(&task->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    int64_t head;
    while ((head = __atomic_fetch_add(&task->next, 1, __ATOMIC_RELAXED)) < task->B * task->H)
        (task->dk ? backward : forward)(task, head, scratch);
    free(scratch);
}

/* Fill `out`, and the others where they are given; returns whether there was memory. `parallel` is GOMP_parallel of the
   OpenMP that torch uses. */
int attend(const float *q, const float *k, const float *v, const int64_t *strides, const float *y,
           const float *gradient, float *out, float *dk, float *dv, float *lse, const int64_t *sizes, float scale,
           double p, int64_t seed, unsigned threads, void (*parallel)(void (*)(void *), void *, unsigned, unsigned))
{
    Task task = {q, k, v, strides, y, gradient, out, dk, dv, lse, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                 sizes[5], 0, scale, (float)(1 / (1 - p)), {(uint32_t)seed, (uint32_t)(seed >> 32)}, (uint32_t)(p * 0x1p32), 0};
    if (threads > 1) parallel(work, &task, threads, 0);
    else work(&task);
    return !task.failed;
}
