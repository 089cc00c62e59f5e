"""Every tolerance of the suite in one table: the bound, the worst error measured, and what is compared.

Measured on a CPU with jax 0.10.2, torch 2.13 and transformers 5.23 unless the text says otherwise, by
`python -m pytest -p tests.measured`. No bound is loosened to make a test pass: an error near its bound is a finding.
Numbers that were worked out by hand are compared with the defaults of `pytest.approx` and NumPy, which need no entry.
"""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """A bound, the worst error that was measured, and what is compared.

    `measured` is None where it was not recorded, and 0.0 only where the compared bits are equal.
    """

    bound: float
    measured: float | None
    what: str


TOLERANCES: dict[str, Tolerance] = {
    "parity_fp32": Tolerance(5e-6, 1.3e-6, "logits, hidden states, router logits against transformers, relative L2"),
    "oracle_fp32": Tolerance(5e-6, 9.3e-7, "jaxmoe, and transformers, against the float64 oracle"),
    "log_probabilities": Tolerance(
        2e-5, 1.3e-5, "sums of log-probabilities against logits in float64, or the harness's hf, relative"
    ),
    "log_probabilities_bf16": Tolerance(5e-2, 2.7e-2, "the same with NF4 and bfloat16, other batches, nats per token"),
    "saliency_fp32": Tolerance(2e-6, 2.0e-7, "what pruning sums up about each expert against a loop in float64"),
    "some_experts_slope": Tolerance(
        2e-6, 6.0e-7, "gradients of adapters of some experts against differences in float64"
    ),
    "load_balancing_loss": Tolerance(2e-6, 2.3e-7, "auxiliary loss against transformers, relative"),
    "parity_loss": Tolerance(2e-6, 1.6e-7, "training loss against transformers, relative"),
    "parity_gradients": Tolerance(1e-4, 5.4e-6, "each adapter's gradient in each layer against PEFT, relative L2"),
    "dispatch_fp32": Tolerance(
        2e-6, 1.2e-6, "sort-based dispatch against the dense oracle, value and gradients, relative L2"
    ),
    "bf16_against_transformers": Tolerance(0.75, 0.68, "bfloat16 error against float64, over transformers' own"),
    "attention_fp32": Tolerance(
        2e-6, 4.0e-7, "attention in chunks against the masked one, value and gradients, relative L2"
    ),
    "packing_isolation": Tolerance(
        1e-6, 0.0, "logits of a document when another one in its sequence changes: the same bits"
    ),
    "merge_fp32": Tolerance(5e-7, 6.3e-8, "weights with a merged adapter against PEFT's own merge, relative L2"),
    "nf4_model": Tolerance(1e-6, 0.0, "hidden states in NF4 against a model with the decoded weights: the same bits"),
    "nf4_gradients": Tolerance(2e-6, 0.0, "the same for the gradients of its adapters: the same bits"),
    "rotary_frequencies": Tolerance(1e-6, 3.6e-7, "inverse frequencies against transformers and the oracle, relative"),
    "routing_margin": Tolerance(1e-5, None, "top-k margin in probability above which the same experts must be chosen"),
    "accumulation": Tolerance(2e-6, 1.2e-6, "loss and gradients of several micro-batches against one batch, relative"),
    "mesh_fp32": Tolerance(
        1e-5, None, "losses, gradients and trained arrays on a mesh against one device, relative L2"
    ),
    "dropout_fp32": Tolerance(2e-6, 1.0e-6, "a linear map with dropout, value and gradients, against explicit masks"),
    "preference_gradients_fp32": Tolerance(2e-6, None, "gradients of a loss over pairs, against those from all logits"),
    "preference_loss": Tolerance(2e-6, 6.0e-7, "losses over pairs against TRL and against float64, relative"),
    "preference_rewards": Tolerance(2e-6, 6.0e-7, "what they report, differences of sums over tokens, absolute"),
    "preference_gradients": Tolerance(1e-4, 3.6e-5, "their gradients against TRL on the demo checkpoint, relative L2"),
    "preference_slope": Tolerance(1e-4, 3.0e-6, "their gradients against a difference of float64 losses, relative"),
    "stored_reference": Tolerance(1e-5, 6.4e-7, "rewards under a stored reference against one that each step asks"),
    "router_losses_fp32": Tolerance(2e-6, None, "z-loss and routing penalty against loops in float64, relative"),
    "captured_base": Tolerance(1e-5, None, "penalty from a capture against one with a second forward pass, relative"),
    "no_penalty_fp32": Tolerance(1e-7, None, "gradient of the penalty where router and base are equal, absolute"),
    "watch_fp32": Tolerance(2e-6, 2.6e-8, "measures of a probe's routing against loops in float64, relative"),
    "compiled_divergence_fp32": Tolerance(2e-5, 3.3e-6, "divergences of two routers' logits against float64, relative"),
    "vanishing_divergence": Tolerance(1e-30, 9.3e-34, "divergences that float32 takes for zero against float64, nats"),
    "small_divergence_fp32": Tolerance(2e-5, 1.9e-7, "a divergence of 1e-7 nats, from float32 logits, relative"),
    "optimizer_alone": Tolerance(2e-6, 7.0e-8, "an update of a matrix in a stack against that of the matrix alone"),
    "difference_quotient": Tolerance(2e-2, None, "a gradient against a central difference of 1e-2, float32"),
    "golden_losses_fp32": Tolerance(1e-5, None, "losses of ten LoRA steps against those recorded, float32, relative"),
    "reloaded_loss": Tolerance(
        2e-6, 4e-8, "held-out loss of a run's output, read again by jaxmoe or transformers, relative"
    ),
    "gpu_fp32": Tolerance(
        5e-6, 5.4e-7, "H200 against CPU in float32: logits and loss of the demo checkpoint, relative"
    ),
    "gpu_gradients_fp32": Tolerance(1e-4, 2.0e-6, "the same for the gradient of each adapter, relative L2"),
    "kernel_bf16": Tolerance(5e-3, 1.7e-3, "grouped matmul kernel, bfloat16, against float64 products, relative L2"),
    "kernel_swiglu_bf16": Tolerance(5e-3, 2.0e-3, "the same with SwiGLU of the rounded products in the kernel"),
    "fp8_rows": Tolerance(
        2e-3, 3.3e-7, "experts in FP8 whose rows are quantised, too, float32, against torch_ref; a code may round apart"
    ),
    "kernel_fp32_sums": Tolerance(2e-6, 2.7e-7, "the same for outer products of bfloat16 rows, summed in float32"),
    "mixture_bf16": Tolerance(1e-2, None, "mixture in bfloat16 by the kernels, value and gradients, against float32"),
    "few_rows_fp32": Tolerance(1e-6, 9.4e-8, "products of few rows against XLA's, relative L2"),
    "few_rows_bf16": Tolerance(4e-3, None, "SwiGLU of them, where one bfloat16 rounding may fall the other way"),
    "few_rows_model_bf16": Tolerance(1e-2, 4.9e-3, "a step of decoding with the kernels against XLA, bfloat16"),
    "cached_attention_bf16": Tolerance(6e-3, None, "attention over the cache in one launch against XLA, bfloat16"),
    "cached_attention_written_bf16": Tolerance(1e-3, None, "the cache after it: some new keys round the other way"),
    "unrolled_run_fp32": Tolerance(1e-5, None, "losses and gradient norms of a run, unrolled against scanned"),
    "swiglu_gradient_bf16": Tolerance(4e-3, 2.6e-3, "bfloat16 against float32: one rounding"),
    "swiglu_gradient_model_bf16": Tolerance(
        1e-2, 4.9e-3, "gradients of a bfloat16 model with unrolled layers, against XLA's rounding of the same steps"
    ),
    "norm_rotary_bf16": Tolerance(2e-3, 1.7e-3, "norm and rotation in one pass against float32; two roundings: 2.4e-3"),
    "norm_rotary_model_bf16": Tolerance(
        5e-3, 1.7e-3, "the same in a bfloat16 model against XLA: loss, gradients, operations; one of both may not round"
    ),
    "gpu_experts_bf16": Tolerance(5e-3, 4.8e-3, "bfloat16 experts at full width against float32, value and gradient"),
    "gpu_attention_bf16": Tolerance(
        5e-3, None, "cuDNN's attention against the masked one in float32, value, gradients"
    ),
    "torch_ref_fp32": Tolerance(2e-6, 4.9e-7, "torch_ref's outputs against stock transformers, float32, relative L2"),
    "torch_ref_gradients": Tolerance(1e-5, 1.7e-6, "torch_ref's gradients against transformers and PEFT, relative L2"),
    "torch_ref_bf16": Tolerance(1.0, 0.96, "torch_ref's bfloat16 error against float64, over transformers' own"),
    "torch_ref_autocast": Tolerance(
        1e-1, 5.3e-2, "an expert gradient under autocast, two bfloat16 results, relative L2"
    ),
    "applied_adapter": Tolerance(
        7e-4, 6.1e-4, "the matrix that an adapter applies to bfloat16 rows; rounded A, B: 2.3e-3"
    ),
    "low_rank_gradients_float32": Tolerance(1e-6, 0.0, "an adapter's gradients against plain products: the same bits"),
    "low_rank_gradients_bfloat16": Tolerance(5e-3, 2.8e-3, "the same in bfloat16, which itself rounds by 1.7e-3"),
    # the tests of the model
    "remat_gradients_fp32": Tolerance(
        1e-5, 2.0e-6, "adapters' gradients with another recomputation policy, relative L2"
    ),
    "unrolled_gradients_fp32": Tolerance(1e-5, 2.9e-6, "adapters' gradients with unrolled layers, relative L2"),
    "unrolled_outputs_fp32": Tolerance(
        1e-5, 0.0, "the other results of unrolled layers, absolute plus relative: the same bits"
    ),
    "unpacked_gradients_fp32": Tolerance(1e-6, 2.4e-8, "adapters' gradients without segments, relative L2"),
    "routing_weights_fp32": Tolerance(1e-6, 1.2e-7, "renormalised routing weights, relative"),
    "split_high_low": Tolerance(
        1e-5, 2.3e-6, "a float32 matrix against the sum of its two bfloat16 parts, relative L2"
    ),
    "attention_saved_fp32": Tolerance(
        1e-5, 4.7e-8, "what attention saves for its backward pass, absolute plus relative"
    ),
    "attention_saved_bf16": Tolerance(1e-2, None, "the same in bfloat16"),
    "learning_rate_fp32": Tolerance(1e-6, 6.0e-8, "the learning rate of a step against the formula, relative"),
    "sampled_shares": Tolerance(0.025, 1.2e-2, "shares of tokens in 4,000 draws, absolute: three standard deviations"),
    "merge_delta_fp32": Tolerance(1e-6, 1.2e-7, "what a merge adds to a weight against 2 B A, absolute"),
    "nf4_nested_fp32": Tolerance(1e-6, 2.6e-7, "statistics of the second quantisation against bitsandbytes', relative"),
    "published_limits": Tolerance(
        0.01, 2.6e-3, "tokens per second at full speed against those worked out by hand, relative"
    ),
    "reported_speed": Tolerance(
        0.02, None, "tokens per second that a run reports against the time of its steps, relative"
    ),
    "doubled_speed": Tolerance(0.05, None, "the same with a planted fault, against twice the right speed, relative"),
    # routing: captures, interventions, comparisons, figures
    "capture_logits_fp32": Tolerance(2e-5, 2.9e-6, "captured logits, their log-sum-exp and entropy, absolute"),
    "capture_tiny_logits_fp32": Tolerance(1e-5, 5.7e-6, "captured logits of a random model of 32 columns, absolute"),
    "capture_weights_fp32": Tolerance(
        1e-5, 5.1e-7, "captured routing weights, margins and sums of probabilities, absolute"
    ),
    "capture_loss_fp32": Tolerance(1e-4, 6.3e-6, "captured loss of each token, absolute"),
    "capture_sums_fp32": Tolerance(2e-6, 9.1e-8, "captured sums of probabilities over all tokens, relative"),
    "capture_logit_margin": Tolerance(
        1e-4, None, "top-k margin of logits above which the same experts must be captured"
    ),
    "capture_torch_fp32": Tolerance(1e-4, 8.1e-6, "torch_ref's captured logits, entropies and losses, absolute"),
    "capture_torch_sums": Tolerance(1e-4, 4.0e-7, "torch_ref's captured sums of probabilities, relative"),
    "controlled_logits_fp32": Tolerance(
        1e-5, 0.0, "logits before the position whose routing changes, absolute; the same bits"
    ),
    "imposed_weights_fp32": Tolerance(
        1e-6, 0.0, "weights of imposed experts against their probabilities, relative; the same bits"
    ),
    "biased_logits_fp32": Tolerance(1e-5, 2.4e-7, "shift of router logits by a bias, absolute"),
    "effect_fp32": Tolerance(1e-6, 7.8e-7, "change of the loss by an intervention, nats, absolute"),
    "generated_logits_fp32": Tolerance(1e-4, 4.2e-6, "router logits captured in generation against one pass, absolute"),
    "compare_fp32": Tolerance(1e-6, 1.7e-8, "divergence and logit distance of two captures, absolute"),
    "compare_weights_fp32": Tolerance(1e-5, 3.9e-9, "distance of two captures' routing weights, absolute"),
    "compare_loss_change": Tolerance(
        3e-3, 6.0e-4, "mean of 2,000 noisy changes of a loss against their centre, absolute"
    ),
    "summary_fp32": Tolerance(
        1e-6, 9.6e-8, "entropy and balance of a summary against one sum over all tokens, relative"
    ),
    "metrics_fp32": Tolerance(1e-6, 2.8e-9, "load balancing in NumPy against the model's, relative"),
    "metrics_fp64": Tolerance(1e-12, 6.7e-16, "metrics in float64 against values worked out by hand, absolute"),
    "packed_numbers": Tolerance(1 / 65534, 6.9e-6, "numbers of a figure after packing into 16 bits, over their range"),
    "report_digits": Tolerance(1e-5, 2.7e-6, "numbers in a report's CSV files: six digits, relative"),
    # the oracles and measures themselves
    "oracles_fp64": Tolerance(1e-13, 2.3e-15, "the two float64 oracles against each other, relative"),
    "measures_fp64": Tolerance(1e-12, 5.2e-16, "the parity suite's measures against plain sums, relative"),
    "measures_small_kl": Tolerance(1e-5, 2.3e-7, "KL of differences of 1e-9 against half their variance, relative"),
    "torch_ref_loss": Tolerance(1e-6, 2.0e-8, "torch_ref's loss over another number of items, relative"),
    "processed_scores": Tolerance(1e-6, None, "scores of the next token against transformers' processors, relative"),
    "p_value_of_draws": Tolerance(1e-6, None, "below it, draws do not follow a distribution (chi-square)"),
    # the parity suite (tests/parity): both sides against transformers in float32, against float64 in 16 bit
    "parity_model_kl": Tolerance(1e-10, 6.5e-12, "float32: mean KL of the whole model, nats per token"),
    "parity_model_fp32": Tolerance(
        3e-6, 7.1e-7, "float32: logits, and the worst layer's hidden states and router logits"
    ),
    "parity_step": Tolerance(1e-3, 1.1e-4, "float32: an adapter's entries after one step of AdamW, in learning rates"),
    "parity_16_bit": Tolerance(1.0, 0.95, "16 bit, pinned: KL and mean error of layers, over transformers' own"),
    "parity_16_bit_gradients": Tolerance(1.0, 0.92, "16 bit: error of all adapter gradients, over PEFT's own"),
    # torch_ref with adapters exceeds the two bounds above, at up to 1.10: it rounds low-rank rows to 16 bit, while PEFT
    # keeps them in float32. The suite reports that as a missed goal.
    "parity_pinned_kl": Tolerance(1e-4, 7.4e-5, "16 bit, pinned, trained models: jaxmoe's mean KL from float64"),
    "widened": Tolerance(1e-12, 1e-15, "a widened layer against the narrow one, in float64, relative"),
    "bisection_fp32": Tolerance(1e-5, None, "float32: the error above which a layer or operation is named"),
    "bisection_16_bit": Tolerance(5e-2, None, "16 bit: the same"),
    # The margin above which no choice of experts may flip: the 99.9th percentile of the error of differences of stock
    # transformers' router logits, pinned, against float64. Measured: the widest flip that was recorded.
    "flip_margin_demo_float32": Tolerance(2.3e-5, None, "demo checkpoint, float32"),
    "flip_margin_demo_bfloat16": Tolerance(8.5e-2, 5.4e-2, "demo checkpoint, bfloat16"),
    "flip_margin_demo-adapter_float32": Tolerance(3.3e-5, None, "demo checkpoint with a random adapter, float32"),
    "flip_margin_demo-adapter_bfloat16": Tolerance(1.8e-1, 8.0e-2, "demo checkpoint with a random adapter, bfloat16"),
    "torch_ref_gpu_bf16": Tolerance(3e-2, None, "two expert implementations in bfloat16 on an H200"),
}


def bound(name: str) -> float:
    """The bound under `name` in the table."""
    return TOLERANCES[name].bound
