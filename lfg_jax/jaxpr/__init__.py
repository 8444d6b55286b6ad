"""What a function's equations say: its taps, and which losses each can influence.

In reading order: `_compat` (every use of an unstable API of JAX), `taps`, `interpreter`, `tapped`,
`dependence_rules`, `dependence`. What its compiled program computes and sends: `hlo`.
"""
