"""What a run would take, by arithmetic over its configuration; imports no torch and no other room.

The story, in call order: `config` is what the planner is handed, a cluster and one training configuration on it.
`params.count_parameters` counts a decoder's parameters by part, `flops` what a token costs, `cache` what it leaves.
`sharding` says which parameters a rank holds; `memory.count_memory` adds what DeepSpeed holds of them, and what
`activations` says the forward pass keeps. `step_time.predict_step` is the roofline of one step: the operations of a
`micro_batch`, the `traffic` beside its products, the `collectives`, at the `speeds` that a data sheet, or `measured`,
gives. `cost` makes a run of it. `planner.make_plan` is all of it together: go or no-go, and what near it fits;
`compare` sets architectures side by side; `accuracy` says how wrong plans have been. `scaling_law` fits a sweep.
`*_report` and `*_plot` tell it.
"""
