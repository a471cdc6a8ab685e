/* Exact nearest neighbours of a block of queries, by squared L2.
 *
 *   distance[i][j] = sum_t (queries[i][t] - keys[j][t])^2
 *   ids[i], distances[i] = the k smallest (distance[i][j], j), ascending; (-1, inf) where there are fewer than k keys
 *
 * A template: search.c includes it once with `real` float and once with double, NAME(x) giving each its own names.
 * queries (n_queries, d), keys (n_keys, d), ids and distances (n_queries, k): contiguous; k >= 1.
 *
 * Two orders are fixed, so that neither the blocks nor a key's position nor the machine can change a bit:
 * - column t is added to lane t % LANES, columns ascending, and the lanes are folded in half until one is left.
 *   The lanes are what the compiler vectorises. The products must not be fused with the sums (-ffp-contract=off).
 * - keys come in ascending order and the heap is ordered by (distance, id), so equal distances keep the lowest ids.
 */

/* The distances of one query to KEYS_ABREAST keys, which share each load of the query. */
static INLINE void NAME(distances_abreast)(const real *restrict query, const real *restrict keys, ptrdiff_t d,
                                           real *restrict out)
{
    real lanes[KEYS_ABREAST][LANES] = {{0}};
    ptrdiff_t whole = d - d % LANES;
    for (ptrdiff_t t = 0; t < whole; t += LANES)
        for (int j = 0; j < KEYS_ABREAST; j++)
            for (int l = 0; l < LANES; l++) {
                real difference = query[t + l] - keys[j * d + t + l];
                lanes[j][l] += difference * difference;
            }
    for (int j = 0; j < KEYS_ABREAST; j++) {
        for (int l = 0; l < d - whole; l++) {
            real difference = query[whole + l] - keys[j * d + whole + l];
            lanes[j][l] += difference * difference;
        }
        for (int half = LANES / 2; half > 0; half /= 2)
            for (int l = 0; l < half; l++)
                lanes[j][l] += lanes[j][l + half];
        out[j] = lanes[j][0];
    }
}

/* The same sum for a single key, where fewer than KEYS_ABREAST are left. */
static INLINE void NAME(distances_one)(const real *restrict query, const real *restrict key, ptrdiff_t d,
                                       real *restrict out)
{
    real lanes[LANES] = {0};
    for (ptrdiff_t t = 0; t < d; t++) {
        real difference = query[t] - key[t];
        lanes[t % LANES] += difference * difference;
    }
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            lanes[l] += lanes[l + half];
    *out = lanes[0];
}

/* The distances of one query to a block of keys. */
VECTOR_CLONES
static void NAME(distances)(const real *restrict query, const real *restrict keys, ptrdiff_t n_keys, ptrdiff_t d,
                            real *restrict out)
{
    ptrdiff_t j = 0;
    for (; j + KEYS_ABREAST <= n_keys; j += KEYS_ABREAST)
        NAME(distances_abreast)(query, keys + j * d, d, out + j);
    for (; j < n_keys; j++)
        NAME(distances_one)(query, keys + j * d, d, out + j);
}

/* Whether (distance a, id i) comes after (distance b, id j). */
static INLINE int NAME(after)(real a, int64_t i, real b, int64_t j)
{
    return a > b || (a == b && i > j);
}

/* Let (distance, id) sink from the root of a max-heap of `count` entries; what stood at the root is lost. */
static void NAME(sink)(int64_t *ids, real *distances, ptrdiff_t count, real distance, int64_t id)
{
    ptrdiff_t slot = 0;
    while (slot < count / 2) {
        ptrdiff_t child = 2 * slot + 1;
        if (child + 1 < count && NAME(after)(distances[child + 1], ids[child + 1], distances[child], ids[child]))
            child++;
        if (!NAME(after)(distances[child], ids[child], distance, id))
            break;
        distances[slot] = distances[child];
        ids[slot] = ids[child];
        slot = child;
    }
    distances[slot] = distance;
    ids[slot] = id;
}

/* Let (distance, id) rise from the last of `count` entries, a slot that is free. */
static void NAME(rise)(int64_t *ids, real *distances, ptrdiff_t count, real distance, int64_t id)
{
    ptrdiff_t slot = count - 1;
    while (slot > 0) {
        ptrdiff_t parent = (slot - 1) / 2;
        if (!NAME(after)(distance, id, distances[parent], ids[parent]))
            break;
        distances[slot] = distances[parent];
        ids[slot] = ids[parent];
        slot = parent;
    }
    distances[slot] = distance;
    ids[slot] = id;
}

/* The outputs are the heaps while the search runs; at its end each is sorted where it stands. */
static void NAME(search)(const real *queries, ptrdiff_t n_queries, const real *keys, ptrdiff_t n_keys, ptrdiff_t d,
                         ptrdiff_t k, int64_t *ids, real *distances)
{
    real tile[KEY_BLOCK];
    for (ptrdiff_t first = 0; first < n_keys; first += KEY_BLOCK) {
        ptrdiff_t block = n_keys - first < KEY_BLOCK ? n_keys - first : KEY_BLOCK;
        for (ptrdiff_t i = 0; i < n_queries; i++) {
            int64_t *heap_ids = ids + i * k;
            real *heap = distances + i * k;
            NAME(distances)(queries + i * d, keys + first * d, block, d, tile);
            for (ptrdiff_t j = 0; j < block; j++) {
                if (first + j < k)
                    NAME(rise)(heap_ids, heap, first + j + 1, tile[j], first + j);
                else if (tile[j] < heap[0]) /* an equal one has a higher id */
                    NAME(sink)(heap_ids, heap, k, tile[j], first + j);
            }
        }
    }
    for (ptrdiff_t i = 0; i < n_queries; i++) {
        int64_t *heap_ids = ids + i * k;
        real *heap = distances + i * k;
        ptrdiff_t found = n_keys < k ? n_keys : k;
        for (ptrdiff_t last = found - 1; last > 0; last--) {
            real distance = heap[last];
            int64_t id = heap_ids[last];
            heap[last] = heap[0];
            heap_ids[last] = heap_ids[0];
            NAME(sink)(heap_ids, heap, last, distance, id);
        }
        for (ptrdiff_t slot = found; slot < k; slot++) {
            heap_ids[slot] = -1;
            heap[slot] = (real)INFINITY;
        }
    }
}

/* The first row with an entry that is NaN or infinite, or -1. */
VECTOR_CLONES
static ptrdiff_t NAME(row_not_finite)(const real *x, ptrdiff_t rows, ptrdiff_t d)
{
    for (ptrdiff_t i = 0; i < rows; i++) {
        int bad = 0;
        for (ptrdiff_t t = 0; t < d; t++)
            bad |= !(x[i * d + t] - x[i * d + t] == 0);
        if (bad)
            return i;
    }
    return -1;
}
