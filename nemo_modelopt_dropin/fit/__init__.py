"""Choose sizes and number formats under a budget: formulas, prediction and choice. Nothing imports torch or NeMo.

- `limits`: budgets as users write them.
- `files`, `serving`, `devices`, `latency`: bytes on disk, memory and time per token of a shape in a format.
- `formats`, `grid`: the combinations of formats and of sizes to choose from.
- `prediction`, `pareto`: the loss of a combination, and the combinations that no other one beats.
- `choice`: the best combinations under the budgets.
"""
