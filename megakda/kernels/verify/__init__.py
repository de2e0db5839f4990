"""Checks of the Triton kernels that need no GPU.

| module | does |
|---|---|
| `interpreter` | makes TRITON_INTERPRET=1 compute what a GPU computes, bf16 above all |
| `memory` | finds accesses outside a tensor and programs that disturb one another |
| `traffic`, `bytes` | count the bytes of global memory that launches have to move |
| `aot` | compiles launches for a GPU that is not there: registers, spills, instructions |
| `production`, `budget` | the launches whose compilation is guarded, and what they may cost |
| `report` | compiles them all and compares with the figures on record |
| `rounding`, `storage`, `gpu` | bf16 and TF32, arguments in memory, limits of GPUs |
"""
