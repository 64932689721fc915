"""Lightning callbacks that show what an optimizer does and how the loss is curved.

The names under which they log are part of the interface; they stay.

Scalars of `CurvatureMonitor`, to every logger, behind ``curvature/`` (its ``prefix``), in the
loss's own units:

| name | metric | meaning |
|---|---|---|
| ``top_eigenvalue`` | sharpness | λ, the largest eigenvalue |
| ``stability_threshold`` | sharpness | 2/lr of SGD, 2 (1 + β)/lr with momentum, 38/lr of Adam |
| ``sharpness`` | sharpness | what is stable below it: λ plus weight decay; Adam's preconditioned |
| ``trace`` | trace | Hutchinson's estimate, with ``trace_low`` and ``trace_high``, its 95% band |
| ``gradient_share`` | alignment | share of ‖g‖² inside the two top eigenvectors |
| ``gradient_curvature`` | alignment | gᵀH g / ‖g‖² |
| ``spectrum_min``, ``spectrum_max`` | spectrum | the least and the largest Ritz value |
| ``negative_share`` | spectrum | share of eigenvalues below −1% of the largest magnitude |
| ``layer_trace/LAYER`` | layers | the trace of a layer's block |
| ``layer_top_eigenvalue/LAYER`` | layer_sharpness | its largest eigenvalue |
| ``products``, ``seconds`` | all | what the measurement has cost |
| ``time_share`` | all | what all have cost, as a share of the training time |

To TensorBoard alone, behind the same prefix: the histogram ``spectrum``, in which each eigenvalue
counts once; the pictures ``spectrum_figure``, ``layers_figure`` and ``slices_figure``.

`OptimizerMonitor` logs ``optimizer/FIELD`` for each number of a `hvpopt.optim.report.StepReport`
or of the report of the optimizer's own, ``optimizer/FIELD/WORD`` for what ends in words
(``cg_status``, ``outcome``), and the histogram ``optimizer/log_gain`` of SMD.

Both fill the custom layout of TensorBoard (CUSTOM SCALARS) and the text ``report/training``; the
task `train` adds ``results/NAME``, under HPARAMS beside the settings, and ``report/results``.
"""

from hvpopt.lightning.monitors.curvature import CurvatureMonitor
from hvpopt.lightning.monitors.optimizer import OptimizerMonitor

__all__ = ["CurvatureMonitor", "OptimizerMonitor"]
