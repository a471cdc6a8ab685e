/* Relative attention, forward and backward, of one head of one item of the batch. A template: units.h includes it for
 * float and for double, each for several vector units.
 *
 *   logits[i][j] = ((q[i] + u) . k[j] + (q[i] + v) . p[(n - 1 - i) + j]) / sqrt(c)       paper B.1.2; Dai et al. 2019
 *   out[i]       = sum_j exp(logits[i][j] - lse[i]) * values[j],   lse[i] = log sum_j exp(logits[i][j])
 *
 * Queries come in g groups of n, keys in k groups of r. j runs over all k * r keys, and distances are counted within
 * the groups. A key that is masked, or that causality hides from the query, has logit -inf. If all logits are -inf,
 * lse is +inf.
 *
 * The naive version (retro_np/kernels/attention.py) stores all logits, all products with positions and all
 * probabilities. Here TILE queries at a time meet all their keys. Their logits are in a scratch of (TILE, k * r) that
 * stays in the cache. No array of that size is kept for the backward pass. It recomputes the logits, and
 * exp(logits - lse) are the probabilities. A tile meets only TILE + r - 1 distances, so its products with positions are
 * (TILE, TILE + r - 1), and row i has its key j in column TILE - 1 - i + j.
 *
 * Rows of scratch are padded to whole vectors: k groups of r keys become k * width columns, and c becomes c_wide. The
 * padding of keys and values is zero, and that of logits is -inf.
 */

#include "product.h"
#include "tile.h"

/* Sizes of the scratch, in numbers, and pointers into it. */
typedef struct {
    ptrdiff_t width, keys_wide, c_wide, distances; /* padded r, k * r, c; columns of the products with positions */
    real *keys, *keys_t, *values, *values_t;       /* (keys_wide, c_wide) and transposed, (c, keys_wide) */
    real *table, *table_t;                         /* (distances, c_wide), (c, distances) */
    real *bias;                                    /* (keys_wide): 0, or -inf for masked keys and padding */
    real *content, *position;                      /* (TILE, c_wide): (q + u) / sqrt(c), (q + v) / sqrt(c) */
    real *logits, *by_distance, *out;              /* (TILE, keys_wide), (TILE, distances), (TILE, c_wide) */
    real *dout, *dlogits, *dcontent, *dposition;   /* used only by the backward pass */
    real *dkeys, *dvalues, *dtable;                /* the backward pass's sums, shaped as keys, values and table */
} NAME(scratch);

/* n rounded up to whole vectors. */
ALWAYS_INLINE ptrdiff_t NAME(padded)(ptrdiff_t n)
{
    return (n + LANES - 1) / LANES * LANES;
}

/* Lay out the scratch in `memory`, and return its size in numbers. If memory is NULL, only count. */
static ptrdiff_t NAME(lay_out)(const attention_t *a, NAME(scratch) *s, real *memory, int backward)
{
    ptrdiff_t used = 0;
    s->width = NAME(padded)(a->r);
    s->keys_wide = a->k * s->width;
    s->c_wide = NAME(padded)(a->c);
    s->distances = a->table ? NAME(padded)(a->n + a->r + LANES) : 0;
#define TAKE(pointer, count) (s->pointer = memory ? memory + used : NULL, used += (count))
    TAKE(keys, s->keys_wide * s->c_wide);
    TAKE(keys_t, a->c * s->keys_wide);
    TAKE(values, s->keys_wide * s->c_wide);
    TAKE(values_t, backward ? a->c * s->keys_wide : 0);
    TAKE(table, s->distances * s->c_wide);
    TAKE(table_t, a->c * s->distances);
    TAKE(bias, s->keys_wide);
    TAKE(content, TILE * s->c_wide);
    TAKE(position, TILE * s->c_wide);
    TAKE(logits, TILE * s->keys_wide);
    TAKE(by_distance, TILE * s->distances);
    TAKE(out, TILE * s->c_wide);
    if (backward) {
        TAKE(dout, TILE * s->c_wide);
        TAKE(dlogits, TILE * s->keys_wide);
        TAKE(dcontent, TILE * s->c_wide);
        TAKE(dposition, TILE * s->c_wide);
        TAKE(dkeys, s->keys_wide * s->c_wide);
        TAKE(dvalues, s->keys_wide * s->c_wide);
        TAKE(dtable, s->distances * s->c_wide);
    }
#undef TAKE
    return used;
}

/* Gather one head of an array (rows, h, c): out (rows, c_wide) = (x + bias) * scale, padded with zeros. */
TARGET static void NAME(gather)(const attention_t *a, const real *restrict x, ptrdiff_t rows, const real *restrict bias,
                                real scale, real *restrict out, ptrdiff_t c_wide)
{
    const ptrdiff_t c = a->c, stride = a->h * a->c;
    for (ptrdiff_t i = 0; i < rows; i++, x += stride, out += c_wide) {
        if (bias)
            for (ptrdiff_t t = 0; t < c; t++)
                out[t] = (x[t] + bias[t]) * scale;
        else
            for (ptrdiff_t t = 0; t < c; t++)
                out[t] = x[t] * scale;
        for (ptrdiff_t t = c; t < c_wide; t++)
            out[t] = 0;
    }
}

/* The inverse of gather: one head of an array (rows, h, c) = x (rows, c_wide) * scale. */
TARGET static void NAME(scatter)(const attention_t *a, const real *restrict x, ptrdiff_t rows, real scale, real *out,
                                 ptrdiff_t c_wide)
{
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t t = 0; t < a->c; t++)
            out[i * a->h * a->c + t] = x[i * c_wide + t] * scale;
}

/* Load one head of the table. */
TARGET static void NAME(load_table)(const attention_t *a, NAME(scratch) *s, ptrdiff_t head)
{
    if (!a->table)
        return;
    memset(s->table, 0, s->distances * s->c_wide * sizeof(real));
    NAME(gather)(a, (const real *)a->table + head * a->c, a->n_table, NULL, 1, s->table, s->c_wide);
    NAME(transpose)(s->distances, a->c, s->table, s->c_wide, s->table_t, s->distances);
}

/* Load one head of an item's keys, values and mask. */
TARGET static void NAME(load_keys)(const attention_t *a, NAME(scratch) *s, ptrdiff_t item, ptrdiff_t head, int backward)
{
    const real infinity = (real)INFINITY;
    for (ptrdiff_t group = 0; group < a->k; group++) {
        ptrdiff_t first_key = (item * a->k + group) * a->r, column = group * s->width;
        ptrdiff_t offset = (first_key * a->h + head) * a->c, padding = (s->width - a->r) * s->c_wide;
        NAME(gather)(a, (const real *)a->keys + offset, a->r, NULL, 1, s->keys + column * s->c_wide, s->c_wide);
        NAME(gather)(a, (const real *)a->values + offset, a->r, NULL, 1, s->values + column * s->c_wide, s->c_wide);
        memset(s->keys + (column + a->r) * s->c_wide, 0, padding * sizeof(real));
        memset(s->values + (column + a->r) * s->c_wide, 0, padding * sizeof(real));
        for (ptrdiff_t j = 0; j < s->width; j++)
            s->bias[column + j] = j < a->r && (!a->key_mask || a->key_mask[first_key + j]) ? 0 : -infinity;
    }
    NAME(transpose)(s->keys_wide, a->c, s->keys, s->c_wide, s->keys_t, s->keys_wide);
    if (backward)
        NAME(transpose)(s->keys_wide, a->c, s->values, s->c_wide, s->values_t, s->keys_wide);
}

/* The number of keys per group that queries i < end can see: r, or fewer by causality. */
ALWAYS_INLINE ptrdiff_t NAME(seen)(const attention_t *a, ptrdiff_t end)
{
    ptrdiff_t last = a->causal ? end + a->causal_offset : a->r;
    return last < 0 ? 0 : last > a->r ? a->r : last;
}

/* A tile: its queries, their positions in the arrays, and how much of the scratch they use. */
typedef struct {
    ptrdiff_t first, rows; /* queries first <= i < first + rows of the group */
    ptrdiff_t query;       /* the index of the first query in the batch, in rows of (h, c) */
    ptrdiff_t row;         /* the first query's index in lse */
    ptrdiff_t seen, keys;  /* keys per group that the queries see; columns of logits in use, padded */
    ptrdiff_t distance;    /* the first row of the table that the queries use */
} NAME(tile_t);

TARGET static NAME(tile_t) NAME(tile)(const attention_t *a, const NAME(scratch) *s, ptrdiff_t item, ptrdiff_t head,
                                     ptrdiff_t group, ptrdiff_t first)
{
    NAME(tile_t) tile = {.first = first, .rows = a->n - first < TILE ? a->n - first : TILE};
    tile.query = (item * a->g + group) * a->n + first;
    tile.row = ((item * a->h + head) * a->g + group) * a->n + first;
    tile.seen = NAME(seen)(a, first + tile.rows);
    tile.keys = a->k == 1 ? NAME(padded)(tile.seen) : s->keys_wide;
    tile.distance = a->n - first - tile.rows;
    return tile;
}

/* logits (rows, keys) of a tile, with -inf where a key is not seen. Also loads content and position. */
TARGET static void NAME(make_logits)(const attention_t *a, NAME(scratch) *s, const NAME(tile_t) *tile, ptrdiff_t head)
{
    const real infinity = (real)INFINITY, scale = (real)(1 / sqrt((double)a->c));
    const real *q = (const real *)a->q + (tile->query * a->h + head) * a->c;
    const real *u = a->table ? (const real *)a->u + head * a->c : NULL;
    NAME(gather)(a, q, tile->rows, u, scale, s->content, s->c_wide);
    NAME(product)(tile->rows, tile->keys, a->c, s->content, s->c_wide, 1, s->keys_t, s->keys_wide, s->logits,
                  s->keys_wide, 0);
    if (a->table) {
        NAME(gather)(a, q, tile->rows, (const real *)a->v + head * a->c, scale, s->position, s->c_wide);
        NAME(product)(tile->rows, NAME(padded)(tile->seen + tile->rows - 1), a->c, s->position, s->c_wide, 1,
                      s->table_t + tile->distance, s->distances, s->by_distance, s->distances, 0);
    }
    for (ptrdiff_t i = 0; i < tile->rows; i++) {
        real *restrict row = s->logits + i * s->keys_wide;
        const real *restrict skewed = s->by_distance + i * s->distances + (tile->rows - 1 - i);
        if (a->table)
            for (ptrdiff_t group = 0; group < a->k; group++)
                for (ptrdiff_t j = 0; j < tile->seen; j++)
                    row[group * s->width + j] += skewed[j];
        for (ptrdiff_t j = 0; j < tile->keys; j++)
            row[j] = s->bias[j] < 0 ? s->bias[j] : row[j];
        if (!a->causal)
            continue;
        const ptrdiff_t hidden = NAME(seen)(a, tile->first + i + 1); /* the first hidden key of each group */
        for (ptrdiff_t group = 0; group < a->k; group++)
            for (ptrdiff_t j = hidden; j < a->r && group * s->width + j < tile->keys; j++)
                row[group * s->width + j] = -infinity;
    }
}

/* The forward pass of one head of one group of queries, whose keys are loaded: out and lse. */
TARGET static void NAME(forward_group)(const attention_t *a, NAME(scratch) *s, ptrdiff_t item, ptrdiff_t head,
                                       ptrdiff_t group)
{
    const real infinity = (real)INFINITY;
    for (ptrdiff_t first = 0; first < a->n; first += TILE) {
        NAME(tile_t) tile = NAME(tile)(a, s, item, head, group, first);
        real *out = (real *)a->out + (tile.query * a->h + head) * a->c, *lse = (real *)a->lse + tile.row;
        NAME(make_logits)(a, s, &tile, head);
        real total[TILE];
        for (ptrdiff_t i = 0; i < tile.rows; i++) {
            real *row = s->logits + i * s->keys_wide;
            real peak = tile.keys ? NAME(largest)(row, tile.keys) : -infinity;
            NAME(exponentials)(row, tile.keys, peak == -infinity ? 0 : peak);
            total[i] = NAME(dot)(row, NULL, tile.keys);
            lse[i] = total[i] > 0 ? peak + (real)log((double)total[i]) : total[i] == 0 ? infinity : total[i];
        }
        NAME(product)(tile.rows, s->c_wide, tile.keys, s->logits, s->keys_wide, 1, s->values, s->c_wide, s->out,
                      s->c_wide, 0);
        for (ptrdiff_t i = 0; i < tile.rows; i++)
            NAME(scatter)(a, s->out + i * s->c_wide, 1, total[i] == 0 ? 0 : 1 / total[i], out + i * a->h * a->c,
                          s->c_wide);
    }
}

/* The backward pass of one tile: dq, and the tile's part of dkeys, dvalues, dtable, du and dv.
 *   dvalues += P^T dout;  dP = dout values^T;  dlogits = P * (dP - sum_j P dP + dlse);
 *   dcontent = dlogits keys;  dkeys += dlogits^T content;  the same for positions, with dlogits summed by distance. */
TARGET static void NAME(backward_tile)(const attention_t *a, NAME(scratch) *s, const NAME(tile_t) *tile, ptrdiff_t head,
                                       real *du, real *dv)
{
    const ptrdiff_t wide = s->keys_wide, c_wide = s->c_wide, rows = tile->rows;
    const real scale = (real)(1 / sqrt((double)a->c));
    const real *lse = (const real *)a->lse + tile->row, *dlse = a->dlse ? (const real *)a->dlse + tile->row : NULL;
    NAME(make_logits)(a, s, tile, head);
    NAME(gather)(a, (const real *)a->dout + (tile->query * a->h + head) * a->c, rows, NULL, 1, s->dout, c_wide);
    for (ptrdiff_t i = 0; i < rows; i++)
        NAME(exponentials)(s->logits + i * wide, tile->keys, lse[i]); /* logits now holds probabilities */
    NAME(product)(tile->keys, c_wide, rows, s->logits, 1, wide, s->dout, c_wide, s->dvalues, c_wide, 1);
    NAME(product)(rows, tile->keys, a->c, s->dout, c_wide, 1, s->values_t, wide, s->dlogits, wide, 0);
    for (ptrdiff_t i = 0; i < rows; i++) {
        const real *restrict probabilities = s->logits + i * wide;
        real *restrict row = s->dlogits + i * wide;
        real mean = NAME(dot)(probabilities, row, tile->keys);
        if (dlse && lse[i] != (real)INFINITY) /* a query without keys has no finite lse that could change */
            mean -= dlse[i];
        for (ptrdiff_t j = 0; j < tile->keys; j++)
            row[j] = probabilities[j] * (row[j] - mean);
    }
    NAME(product)(rows, c_wide, tile->keys, s->dlogits, wide, 1, s->keys, c_wide, s->dcontent, c_wide, 0);
    NAME(product)(tile->keys, c_wide, rows, s->dlogits, 1, wide, s->content, c_wide, s->dkeys, c_wide, 1);
    if (a->table) {
        const ptrdiff_t distances = tile->seen ? tile->seen + rows - 1 : 0, stride = s->distances;
        for (ptrdiff_t i = 0; i < rows; i++) {
            real *restrict skewed = s->by_distance + i * stride;
            memset(skewed, 0, distances * sizeof(real));
            skewed += rows - 1 - i;
            for (ptrdiff_t group = 0; group < a->k; group++)
                for (ptrdiff_t j = 0; j < tile->seen; j++)
                    skewed[j] += s->dlogits[i * wide + group * s->width + j];
        }
        NAME(product)(rows, c_wide, distances, s->by_distance, stride, 1, s->table + tile->distance * c_wide, c_wide,
                      s->dposition, c_wide, 0);
        NAME(product)(distances, c_wide, rows, s->by_distance, 1, stride, s->position, c_wide,
                      s->dtable + tile->distance * c_wide, c_wide, 1);
        for (ptrdiff_t i = 0; i < rows; i++)
            for (ptrdiff_t t = 0; t < a->c; t++) {
                du[t] += s->dcontent[i * c_wide + t] * scale;
                dv[t] += s->dposition[i * c_wide + t] * scale;
                s->dcontent[i * c_wide + t] += s->dposition[i * c_wide + t];
            }
    }
    NAME(scatter)(a, s->dcontent, rows, scale, (real *)a->dq + (tile->query * a->h + head) * a->c, c_wide);
}

/* The backward pass of one head of the items first <= b < last. Their sums go to the dtable, du and dv of `part`. */
TARGET static void NAME(backward_head)(const attention_t *a, NAME(scratch) *s, ptrdiff_t part, ptrdiff_t first,
                                       ptrdiff_t last, ptrdiff_t head)
{
    real *du = a->table ? (real *)a->du + (part * a->h + head) * a->c : NULL;
    real *dv = a->table ? (real *)a->dv + (part * a->h + head) * a->c : NULL;
    for (ptrdiff_t t = 0; du && t < a->c; t++)
        du[t] = dv[t] = 0;
    memset(s->dtable, 0, s->distances * s->c_wide * sizeof(real));
    for (ptrdiff_t item = first; item < last; item++) {
        NAME(load_keys)(a, s, item, head, 1);
        memset(s->dkeys, 0, s->keys_wide * s->c_wide * sizeof(real));
        memset(s->dvalues, 0, s->keys_wide * s->c_wide * sizeof(real));
        for (ptrdiff_t group = 0; group < a->g; group++)
            for (ptrdiff_t query = 0; query < a->n; query += TILE) {
                NAME(tile_t) tile = NAME(tile)(a, s, item, head, group, query);
                NAME(backward_tile)(a, s, &tile, head, du, dv);
            }
        for (ptrdiff_t group = 0; group < a->k; group++) {
            ptrdiff_t out = (((item * a->k + group) * a->r) * a->h + head) * a->c, in = group * s->width * s->c_wide;
            NAME(scatter)(a, s->dkeys + in, a->r, 1, (real *)a->dkeys + out, s->c_wide);
            NAME(scatter)(a, s->dvalues + in, a->r, 1, (real *)a->dvalues + out, s->c_wide);
        }
    }
    if (a->table)
        NAME(scatter)(a, s->dtable, a->n_table, 1, (real *)a->dtable + (part * a->n_table * a->h + head) * a->c,
                      s->c_wide);
}

/* Whether the size of the scratch can be addressed. An empty array's shape may be too large. */
static int NAME(fits)(const attention_t *a)
{
    double keys = (double)a->k * ((double)a->r + LANES), c = (double)a->c + LANES;
    double distances = (double)a->n + a->r + 2 * LANES;
    return (keys + distances + TILE) * (8 * c + 3 * TILE) < (double)PTRDIFF_MAX / 16;
}

/* Run the tasks first <= t < last: t is head t / parts of part t % parts. In the forward pass, a part is a group of
 * queries of an item. Returns -1 if memory does not suffice. */
static int NAME(run)(const attention_t *a, ptrdiff_t first, ptrdiff_t last, int backward)
{
    NAME(scratch) s;
    if (first == last)
        return 0;
    if (!NAME(fits)(a))
        return -1;
    real *memory = malloc((NAME(lay_out)(a, &s, NULL, backward) + 1) * sizeof(real));
    if (!memory)
        return -1;
    NAME(lay_out)(a, &s, memory, backward);
    ptrdiff_t loaded = -1, keys_loaded = -1;
    for (ptrdiff_t task = first; task < last; task++) {
        ptrdiff_t head = task / a->parts, part = task % a->parts;
        if (head != loaded)
            NAME(load_table)(a, &s, loaded = head);
        if (backward) {
            NAME(backward_head)(a, &s, part, part * a->batch / a->parts, (part + 1) * a->batch / a->parts, head);
            continue;
        }
        if (task / a->g != keys_loaded) /* the groups of an item are consecutive, and share its keys */
            NAME(load_keys)(a, &s, part / a->g, head, 0);
        keys_loaded = task / a->g;
        NAME(forward_group)(a, &s, part / a->g, head, part % a->g);
    }
    free(memory);
    return 0;
}
