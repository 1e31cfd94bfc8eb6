"""gemma_grpo: teach Gemma 3 to show its work, first by SFT and then by GRPO, in JAX.

The flow of one training step:

    problems -> prompts -> tokens -> rollout -> rewards -> advantages -> loss -> update

Letters that array names end in, one per axis:

    P prompts   G generations per prompt   B = P*G rows, group-major: row b = p*G + g
    S prompt slots (left-padded)   T completion slots (right-padded)   L = S + T   C cache slots
    D embed_dim   F hidden_dim   N query heads   K kv heads   R = N/K   H head_dim   V vocab

Imports point down: train, evaluate, generate, plan > config, presets > sft, grpo > evaluation,
checkpoint, metrics, report > rollout, logps, update, train_state > model, weights, data, tokenizer,
sampling > advantages, losses, rewards, kernels, mesh, errors. A test holds it.
"""
