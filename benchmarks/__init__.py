"""What this project measures of itself: programs to run from the repository root, as in `python -m benchmarks.latency`.

| program | measures |
|---|---|
| `latency` | process start to first frame, AR steps by stage, whole clips; beside peers in the same process |
| `stages` | every network by itself, and how far it is from its floor |
| `attention` | attention of one chunk, kernel by kernel |
| `full_size_export`, `plan_builds` | what exporting and compiling the full-size model take on a small machine |
| `render_tables` | nothing: writes the tables of README.md and docs/performance.md from `results/` |
"""
