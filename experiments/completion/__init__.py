"""Completion of digits: an energy answers questions that no network was trained on.

`questions.py` says what may be known of an image, `data.py` asks that of scikit-learn's digits,
`networks.py` holds the energy and its rival, `answers.py` what they make of a question. The command
`python -m hvpopt.experiments.completion OUT.png` trains, compares and draws.
"""
