"""Our answers to tutorial 9's exercises."""

import numpy as np

from retro_np.retrieval.edit import compact, remove_documents


def searches(n_prompt, length, m):
    read = n_prompt + length - 1
    return list(range(read // m))


def run_lengths(tokens, values):
    out = np.zeros(len(tokens), int)
    for i in range(len(tokens)):
        for value in values:
            for j in range(len(value)):
                run = 0
                while run <= min(i, j) and tokens[i - run] == value[j - run] != 0:
                    run += 1
                out[i] = max(out[i], run)
    return out


def forget(path, name):
    remove_documents(path, [name])
    database = compact(path)
    return [record["name"] for record in database.documents]
