"""Names of the results that a recomputation policy may keep for the backward pass (`jax.ad_checkpoint`).

`jaxmoe.model.layer_loop` says which policy keeps which.
"""

LAYER_INPUT = "layer_input"  # the residual stream at the start of a layer, [B, T, D]
PROJECTED = "query_key_value"  # queries, keys and values before norm and rotation, and their low-rank rows
ATTENTION_OUT = "attention_out"  # the heads' output
ATTENTION_LOG_SUM = "attention_log_sum"  # the log-sum-exp of each query's logits
ATTENTION_UPDATE = "attention_update"  # what attention adds to the residual stream
ROUTING = "routing"  # router logits, experts and weights; the rest of the routing follows from them
SCHEDULE = "expert_schedule"  # the row layout, small, made by a counting sort
GATE_UP = "gate_up_product"  # the product of gate and up, [P, 2F], the largest result of a layer; and low-rank rows
