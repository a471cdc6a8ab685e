/* The module retro_np._c. Each kernel has a .c file with its checks, and a header with the computation. */

#include "module.h"

static PyMethodDef methods[] = {
    {"nearest", nearest, METH_VARARGS,
     "nearest(queries, keys, first_id, ids, distances)\n--\n\n"
     "Update the lists of each query's k nearest keys, by squared L2, with more keys.\n\n"
     "queries (N, d) and keys (M, d): float32 or float64; ids (N, k) int64; distances (N, k) of the queries' type.\n"
     "A list is ascending by (distance, id), with -1 and inf for missing entries. Key j has the id first_id + j.\n"
     "Raises TypeError or ValueError, naming the argument, for other arrays and for entries that are not finite. The\n"
     "lists are then undefined."},
    {"nearest_screened", nearest_screened, METH_VARARGS,
     "nearest_screened(queries, keys, products, query_norms, key_norms, first_id, ids, distances)\n--\n\n"
     "Like nearest, but for finite keys, and without measuring the keys that products and norms exclude.\n\n"
     "products (N, M): q.k, approximately; query_norms (N), key_norms (M): lower bounds of |q|^2 and |k|^2, by\n"
     "csrc/search.h. Raises TypeError or ValueError, naming the argument."},
    {"attention_forward", attention_forward, METH_VARARGS,
     "attention_forward(q, keys, values, table, u, v, key_mask, causal_offset, out, lse, first, last)\n--\n\n"
     "Relative attention: write out and lse for the tasks first <= t < last; task t is head t // (B g) of group\n"
     "t % (B g) of queries, counted over all items.\n\n"
     "q and out (B, g, n, h, c); keys and values (B, k, r, h, c); table (T, h, c), u and v (h, c), all three None\n"
     "without positions; key_mask (B, k, r) bool or None; causal_offset an integer or None; lse (B, h, g, n): float32\n"
     "or float64, all the same. Raises TypeError or ValueError, naming the argument."},
    {"attention_backward", attention_backward, METH_VARARGS,
     "attention_backward(dout, lse, dlse, q, keys, values, table, u, v, key_mask, causal_offset, dq, dkeys,\n"
     "    dvalues, dtable, du, dv, first, last)\n--\n\n"
     "The pullback: write the gradients for the tasks first <= t < last; task t is head t // P of part t % P.\n\n"
     "Part p contains the items p * B / P <= b < (p + 1) * B / P and has its own sums: dtable (P, T, h, c), du and dv\n"
     "(P, h, c). Without positions the three are None, and each item is a part. dlse (B, h, g, n) may be None."},
    {"multiply_panels", multiply_panels, METH_VARARGS,
     "multiply_panels(x, panels, out, first, last)\n--\n\n"
     "Write the columns of out = x w that come from the panels first <= p < last of w.\n\n"
     "x (M, K); panels (P, K, 64), panel p being w[:, 64 p : 64 (p + 1)]; out (M, 64 P): float32 or float64, all the\n"
     "same. Raises TypeError or ValueError, naming the argument."},
    {"norm_forward", norm_forward, METH_VARARGS,
     "norm_forward(x, gain, bias, eps, y, first, last)\n--\n\n"
     "Write the rows first <= i < last of y: LayerNorm of x, or RMSNorm if bias is None.\n\n"
     "x and y (N, d), gain and bias (d): float32 or float64, all the same. Raises TypeError or ValueError, naming the\n"
     "argument."},
    {"norm_backward", norm_backward, METH_VARARGS,
     "norm_backward(dy, x, gain, bias, eps, dx, dgain, dbias, first, last)\n--\n\n"
     "The pullback: write dx, and the sums over the rows of each of the parts first <= p < last.\n\n"
     "dx (N, d). Part p contains the rows p * N / P <= i < (p + 1) * N / P and has its own sums: dgain and\n"
     "dbias (P, d). dbias is None if bias is None."},
    {"swiglu_forward", swiglu_forward, METH_VARARGS,
     "swiglu_forward(gate, up, y, first, last)\n--\n\n"
     "Write the entries first <= i < last of y = gate * s(gate) * up, s the logistic function.\n\n"
     "gate, up and y (N): float32 or float64, all the same. Raises TypeError or ValueError, naming the argument."},
    {"swiglu_backward", swiglu_backward, METH_VARARGS,
     "swiglu_backward(dy, gate, up, dgate, dup, first, last)\n--\n\n"
     "The pullback: write the entries first <= i < last of dgate and dup, (N) each."},
    {"rotary", rotary, METH_VARARGS,
     "rotary(x, cos, sin, y, first, last)\n--\n\n"
     "Write the rows first <= i < last of y: each pair x[i, :, 0, j], x[i, :, 1, j] turned by the angle j of row i mod T.\n\n"
     "x and y (N, h, 2, d), cos and sin (T, d): float32 or float64, all the same. Raises TypeError or ValueError,\n"
     "naming the argument."},
    {"vector_unit", vector_unit, METH_VARARGS,
     "vector_unit(name=None)\n--\n\n"
     "The vector unit that attention and products run on: 'avx512', 'avx2' or 'plain'. With a name, switch to that\n"
     "unit. Raises ValueError if the processor does not have it."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "retro_np._c", "The kernels of retro_np in C.", 0, methods, slots, NULL,
    NULL, NULL,
};

PyMODINIT_FUNC PyInit__c(void)
{
    return PyModuleDef_Init(&definition);
}
