"""Chooses launch configurations by timing them on a GPU, and compiles them where there is none.

| module | does |
|---|---|
| `cases` | calls of the operators at production sizes, on any device |
| `targets` | for each kernel: where its configuration is looked up, in which cases, what to try |
| `tables` | launch tables with one entry changed, in use or on disk |
| `screen` | compiles the candidates and drops those that cannot be good |
| `search` | times the others, keeps those that compute the same, and takes the fastest |
| `command` | the command line of tools/tune_kernels.py |
"""
