"""Our answers to the exercises of tutorial 4, in NumPy alone."""

import numpy as np


def skewed_by_reshaping(by_distance, r):
    n, width = by_distance.shape
    flat = by_distance.reshape(-1)
    rows = flat[n - 1 : n - 1 + n * (width - 1)]  # two rows of the result begin one element less than a row apart
    return rows.reshape(n, width - 1)[:, :r]


def position_scores(q, b_p, table, r):
    n = len(q)
    rows = np.arange(n)[:, None]
    columns = n - 1 - rows + np.arange(r)
    by_distance = (q + b_p) @ table.T

    def vjp(dscores):
        dby_distance = np.zeros_like(by_distance)
        dby_distance[rows, columns] = dscores
        dq = dby_distance @ table
        return dq, dq.sum(axis=0), dby_distance.T @ (q + b_p)

    return by_distance[rows, columns], vjp


def copying_table(m):
    table = np.zeros((3 * m - 1, 1, 1))
    largest = (m - 1) + (m - 1)  # of the last query and the first key; the last row is that of −m
    table[largest - -1] = 50
    return table


def attention_over_neighbours(q, keys, values, table, b_c, b_p):
    (n, c), (k, r) = q.shape, keys.shape[:2]
    K, V = keys.reshape(k * r, c), values.reshape(k * r, c)
    by_position, position_vjp = position_scores(q, b_p, table, r)
    Z = ((q + b_c) @ K.T + np.tile(by_position, k)) / np.sqrt(c)
    A = np.exp(Z - Z.max(axis=1, keepdims=True))
    A /= A.sum(axis=1, keepdims=True)

    def vjp(dout):
        dA, dV = dout @ V.T, A.T @ dout
        dZ = A * (dA - np.sum(A * dA, axis=1, keepdims=True)) / np.sqrt(c)
        dby_position = dZ.reshape(n, k, r).sum(axis=1)  # all neighbours have the same positions
        dq_position, db_p, dtable = position_vjp(dby_position)
        dq_content, dK = dZ @ K, dZ.T @ (q + b_c)
        dq = dq_content + dq_position
        return dq, dK.reshape(keys.shape), dV.reshape(values.shape), dtable, dq_content.sum(axis=0), db_p

    return A @ V, vjp
