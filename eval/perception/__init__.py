"""Machine perception: how well a frozen task model reads what a codec has decoded, against the rate.

The protocol is MPQ (Jacobellis, Cummings, Yadwadkar, 2024): every test item is coded to a file and decoded from it,
an unchanged task model judges the decoded item, and the score is set against that on undamaged items. `task` holds the
contract of a task, `models` and `adapters` the task models, `statistics` the intervals and tests, `runner` the run.
"""
