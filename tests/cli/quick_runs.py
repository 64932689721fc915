"""Overrides that make a run short."""

# Short, and independent of the second-order optimizers.
QUICK = [
    "optimizer=adamw",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=2",
    "trainer.enable_progress_bar=false",
    "callbacks.progress_bar=null",
    "callbacks.optimizer_monitor=null",
    "callbacks.curvature_monitor=null",
]
