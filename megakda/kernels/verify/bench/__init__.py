"""Times the kernels beside other implementations, on the same inputs, in one process.

| module | does |
|---|---|
| `problems` | shapes, and random inputs of a shape |
| `sides` | the implementations that are compared |
| `agreement` | errors against float64 and between sides; a side that is wrong gets no time |
| `measure` | times and peak memory |
| `run`, `decode`, `determinism` | the benchmarks: whole sequences, decode steps, equal bits |
| `environment`, `report`, `plot` | what it ran on; JSON and Markdown; a picture |

Sides are libraries that megakda does not depend on: they are imported by name where they are used.
"""
