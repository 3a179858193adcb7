/* What follows a packed projection in float32 on a CPU, and its gradient: rotary positions, SwiGLU. A row is a position
   of a sequence; it holds queries, keys, values, feed-forward values and gates. */

typedef struct {
    const float *packed, *tables[4]; /* (rows, W); cosines and sines of queries, and of keys, (T, K/2) */
    float *out;                      /* gradient of packed, or none */
    float *q, *k, *v, *hidden;       /* results, or their gradients: (rows, H·K), twice (rows, G·K), (rows, F) */
    int64_t rows, T, H, G, K, F, share, next;
    int gate_first;                  /* gates lie before feed-forward values */
} Task;

INLINE Vector part(const float *x, int64_t n) /* the first n of a vector, then zeros */
{
    Vector y = {0};
    if (n >= WIDTH) memcpy(&y, x, sizeof y);
    else memcpy(&y, x, n * sizeof *x);
    return y;
}

INLINE void put(float *to, Vector x, int64_t n)
{
    if (n >= WIDTH) memcpy(to, &x, sizeof x);
    else memcpy(to, &x, n * sizeof *to);
}

/* Turn n heads of width K by angles whose sines are multiplied by `sign`. */
static void rotate(float *to, const float *x, int64_t n, int64_t K, const float *cosines, const float *sines, float sign)
{
    const int64_t half = K / 2;
    for (; n > 0; n--, x += K, to += K)
        for (int64_t i = 0; i < half; i += WIDTH) {
            const Vector first = part(x + i, half - i), second = part(x + half + i, half - i);
            const Vector c = part(cosines + i, half - i), s = part(sines + i, half - i) * sign;
            put(to + i, first * c - second * s, half - i);
            put(to + half + i, second * c + first * s, half - i);
        }
}

INLINE Vector sigmoid(Vector x)
{
    const Integers below = x < 0;
    const Vector e = exponential(chosen(below, x) - chosen(~below, x));
    return (chosen(below, e) + chosen(~below, all(1))) / (e + 1);
}

static void forward(const Task *task, int64_t row)
{
    const int64_t heads = task->H * task->K, others = task->G * task->K, F = task->F, at = row % task->T * (task->K / 2);
    const float *x = task->packed + row * (heads + 2 * others + 2 * F), *value = x + heads + 2 * others;
    rotate(task->q + row * heads, x, task->H, task->K, task->tables[0] + at, task->tables[1] + at, 1);
    rotate(task->k + row * others, x + heads, task->G, task->K, task->tables[2] + at, task->tables[3] + at, 1);
    memcpy(task->v + row * others, x + heads + others, others * sizeof *x);
    const float *gate = value + (task->gate_first ? 0 : F);
    value += task->gate_first ? F : 0;
    for (int64_t i = 0; i < F; i += WIDTH) {
        const Vector g = part(gate + i, F - i);
        put(task->hidden + row * F + i, g * sigmoid(g) * part(value + i, F - i), F - i);
    }
}

static void backward(const Task *task, int64_t row)
{
    const int64_t heads = task->H * task->K, others = task->G * task->K, F = task->F, at = row % task->T * (task->K / 2);
    const int64_t before = heads + 2 * others, start = row * (before + 2 * F);
    float *to = task->out + start;
    rotate(to, task->q + row * heads, task->H, task->K, task->tables[0] + at, task->tables[1] + at, -1);
    rotate(to + heads, task->k + row * others, task->G, task->K, task->tables[2] + at, task->tables[3] + at, -1);
    memcpy(to + heads + others, task->v + row * others, others * sizeof *to);
    const int64_t value = before + (task->gate_first ? F : 0), gate = before + (task->gate_first ? 0 : F);
    for (int64_t i = 0; i < F; i += WIDTH) {
        const Vector grad = part(task->hidden + row * F + i, F - i), g = part(task->packed + start + gate + i, F - i);
        const Vector share = sigmoid(g), x = part(task->packed + start + value + i, F - i);
        put(to + value + i, grad * g * share, F - i);
        put(to + gate + i, grad * x * share * (g * (1 - share) + 1), F - i);
    }
}

/* Take shares of the rows until none is left. */
static void work(void *shared)
{
    Task *task = shared;
    int64_t row;
    while ((row = __atomic_fetch_add(&task->next, task->share, __ATOMIC_RELAXED)) < task->rows)
        for (const int64_t end = task->rows - row > task->share ? row + task->share : task->rows; row < end; row++)
            (task->out ? backward : forward)(task, row);
}

/* Fill the results, or `out` from their gradients; `sizes`: rows, T, H, G, K, F. `parallel` is GOMP_parallel of the
   OpenMP that torch uses. */
void split(const float *packed, const float *q_cos, const float *q_sin, const float *k_cos, const float *k_sin,
           float *out, float *q, float *k, float *v, float *hidden, const int64_t *sizes, int gate_first,
           unsigned threads, void (*parallel)(void (*)(void *), void *, unsigned, unsigned))
{
    const int64_t shares = 4 * threads;
    Task task = {packed, {q_cos, q_sin, k_cos, k_sin}, out, q, k, v, hidden, sizes[0], sizes[1], sizes[2], sizes[3],
                 sizes[4], sizes[5], (sizes[0] + shares - 1) / shares, 0, gate_first};
    if (threads > 1) parallel(work, &task, threads, 0);
    else work(&task);
}
