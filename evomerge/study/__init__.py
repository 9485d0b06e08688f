"""The outer loop: trials, their storage and budget, the honest choice of the winner.

Nouns. A **plan** says what to do: fixed recipes, stages, optimizer, budget. A **trial** is one recipe that
was tried, as it is recorded; the **trial log** keeps them in an Optuna storage. The **scorebook** turns a
recipe into item scores and never asks the same item of a recipe twice. A **study** carries the plan out and
has an incumbent; **final** chooses the winner on fresh items and proves it on held-out ones.

Modules: `study` (the loop), `plan`, `trial`, `storage` with `frozen` (a trial in Optuna's form), `scoring`,
`recorder` (scored recipe to recorded trial), `totals` (running sums), `fixed` (what the fixed recipes are),
`baselines` (scores them), `budget`, `final`.
"""
