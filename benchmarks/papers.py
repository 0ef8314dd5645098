"""What two papers print of the cost of pruning, to stand beside what benchmarks/gpu.py measures.

VisPruner (Zhang et al., ICCV 2025), Tables 6 to 8: POPE on one A100 80 GB; TFLOPs and MB of the key-value cache are
those of the visual tokens, its CUDA time stands under ttft_ms, and VisPruner's rows are those with sdpa. FoPru (Jiang
et al., 2024, arXiv:2411.14164), Tables 1, 2 and 5: POPE on a GPU that it does not name; its LLaVA-1.6 is LLaVA-NeXT.
`keep` counts the visual tokens of all tiles, shares are taken of 576 or 2,880, and `of_plain` is the time over that of
the same table without pruning. The first line of VisPruner's Table 7 is printed one column to the left; here its
numbers stand where they belong. In FoPru's Table 2 PruMerge keeps 5.5% and PruMerge+ 25% on average (its Sec. 5.3).
"""

_VISPRUNER = {
    ("VisPruner Tab. 6", "LLaVA-1.5-7B"): [
        (None, 576, 8.02, 288.00, 14.68, 107.26),
        ("fastv", 432, 6.20, 220.50, 14.58, 107.09), ("vispruner", 432, 6.08, 216.00, 14.51, 101.95),
        ("fastv", 288, 4.40, 153.00, 14.52, 99.72), ("vispruner", 288, 4.16, 144.00, 14.46, 93.57),
        ("fastv", 144, 2.62, 85.50, 14.52, 94.67), ("vispruner", 144, 2.26, 72.00, 14.44, 85.06),
        ("fastv", 58, 1.57, 45.31, 14.64, 90.48), ("vispruner", 58, 1.13, 29.00, 14.54, 79.11),
        ("fastv", 29, 1.22, 31.72, 14.63, 89.31), ("vispruner", 29, 0.76, 14.50, 14.54, 78.09),
    ],
    ("VisPruner Tab. 7", "LLaVA-1.5-13B"): [
        (None, 576, 15.28, 450.00, 26.98, 156.64),
        ("fastv", 432, 11.69, 343.13, 26.61, 151.66), ("vispruner", 432, 11.50, 337.50, 26.58, 138.36),
        ("fastv", 288, 8.14, 236.25, 26.40, 137.83), ("vispruner", 288, 7.76, 225.00, 26.31, 124.13),
        ("fastv", 144, 4.62, 129.38, 26.40, 123.69), ("vispruner", 144, 4.05, 112.50, 26.29, 104.81),
        ("fastv", 58, 2.53, 65.70, 26.40, 114.98), ("vispruner", 58, 1.86, 45.31, 26.27, 94.80),
        ("fastv", 29, 1.83, 44.19, 26.55, 114.25), ("vispruner", 29, 1.12, 22.66, 26.43, 94.48),
    ],
    ("VisPruner Tab. 8", "LLaVA-NeXT-7B"): [
        (None, 2880, 43.58, 1440.00, 17.04, 313.04),
        ("fastv", 2160, 33.05, 1102.50, 16.95, 262.49), ("vispruner", 2160, 32.35, 1080.00, 16.33, 246.38),
        ("fastv", 1440, 23.04, 765.00, 16.95, 201.68), ("vispruner", 1440, 21.66, 720.00, 15.11, 176.80),
        ("fastv", 720, 13.53, 427.50, 16.95, 147.93), ("vispruner", 720, 11.51, 360.00, 14.80, 119.87),
        ("fastv", 290, 8.10, 226.56, 16.95, 117.33), ("vispruner", 290, 5.71, 145.00, 14.70, 87.36),
        ("fastv", 145, 6.30, 158.59, 16.95, 112.19), ("vispruner", 145, 3.80, 72.50, 14.70, 78.18),
    ],
}  # fmt: skip
_FOPRU = {
    ("FoPru Tab. 1", "LLaVA-NeXT-8B", "rank"): [
        (None, 2880, 94, 25.61, 17.88), ("fopru", 2160, 88, 25.40, 17.33), ("fopru", 1440, 57, 24.80, 16.98),
        ("fopru", 720, 52, 24.05, 16.98),
    ],
    ("FoPru Tab. 1", "LLaVA-NeXT-7B", "rank"): [
        (None, 2880, 88, 23.70, 16.15), ("fopru", 2160, 81, 23.55, 15.44), ("fopru", 1440, 60, 23.05, 14.81),
        ("fopru", 720, 50, 21.97, 14.57),
    ],
    ("FoPru Tab. 1", "LLaVA-NeXT-13B", "rank"): [
        (None, 2880, 198, 38.30, 29.53), ("fopru", 2160, 153, 36.06, 28.53), ("fopru", 1440, 116, 33.35, 27.53),
        ("fopru", 720, 79, 30.94, 26.54),
    ],
    ("FoPru Tab. 2", "LLaVA-1.5-7B", "rank"): [
        (None, 576, 74, 27.71, 13.91), ("prumerge", 32, 47, 21.95, 13.35), ("prumerge_plus", 144, 74, 21.82, 13.46),
        ("fastv", 432, 69, 27.40, 13.81), ("fopru", 432, 62, 21.45, 13.76),
        ("fastv", 288, 59, 27.16, 13.69), ("fopru", 288, 49, 21.41, 13.61),
        ("fastv", 144, 51, 27.28, 13.52), ("fopru", 144, 38, 20.89, 13.51),
    ],
    ("FoPru Tab. 5", "LLaVA-NeXT-8B", "row"): [
        (None, 2880, 94, 25.61, 17.88), ("fopru", 2160, 74, 24.72, 17.28), ("fopru", 1440, 62, 24.57, 16.98),
        ("fopru", 720, 53, 23.67, 16.98),
    ],
    ("FoPru Tab. 5", "LLaVA-NeXT-7B", "row"): [
        (None, 2880, 88, 23.70, 16.15), ("fopru", 2160, 76, 23.48, 15.40), ("fopru", 1440, 53, 23.10, 14.75),
        ("fopru", 720, 52, 22.82, 14.57),
    ],
    ("FoPru Tab. 5", "LLaVA-NeXT-13B", "row"): [
        (None, 2880, 198, 38.30, 29.53), ("fopru", 2160, 153, 35.66, 28.44), ("fopru", 1440, 110, 33.16, 27.48),
        ("fopru", 720, 76, 30.84, 26.42),
    ],
}  # fmt: skip


def _rows() -> list[dict]:
    names = ("method", "keep", "visual_TFLOPs", "visual_kv_MB", "memory_GB", "ttft_ms")
    rows = [
        {"table": table, "model": model, "options": {}, **dict(zip(names, row, strict=True))}
        for (table, model), lines in _VISPRUNER.items()
        for row in lines
    ]
    names = ("method", "keep", "ttft_ms", "tpot_ms", "memory_GB")
    for (table, model, strategy), lines in _FOPRU.items():
        for row in lines:
            options = {"strategy": "row"} if row[0] == "fopru" and strategy == "row" else {}
            rows.append({"table": table, "model": model, "options": options, **dict(zip(names, row, strict=True))})
    for row in rows:
        plain = next(one for one in rows if one["table"] == row["table"] and one["model"] == row["model"])
        row["of_plain"] = round(row["ttft_ms"] / plain["ttft_ms"], 3)
    return rows


PAPERS = _rows()
