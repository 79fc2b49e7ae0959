"""Frontends: from a model and one request to a traced graph, and from traced operations to row
operations.

Duty: everything that knows PyTorch's operators. Comes in from `cellc.compiler`; goes out as
`cellc.graph.Graph` and `cellc.cells.Cell`. Lives beside the package and is imported as
`cellc.frontends`.
"""

if __name__ != "cellc.frontends":
    raise ImportError("this folder is part of cellc: write `import cellc.frontends`")
