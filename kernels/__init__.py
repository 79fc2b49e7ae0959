"""Backends: what turns a cell into a kernel that runs a launch.

Duty: the package marker of `cellc.kernels`. Comes in: `cellc.cells.Cell` and its weights; goes
out: `cellc.launch.Kernel`. Nothing is imported here: a backend is imported when it is chosen, so
that `import cellc` never loads Triton.
"""

if __name__ != "cellc.kernels":
    raise ImportError("this folder is a part of cellc; write: import cellc.kernels")
