"""The monitors of `hvpopt.lightning.callbacks`, part by part.

`schedule` and `budget` say when to measure, `probe` what the curvature is of, `look` and `measures`
what is found; `album` and `figures` show it, `layout` groups the scalars, `stability` warns.
"""
