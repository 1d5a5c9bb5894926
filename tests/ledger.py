"""The tests whose verdict depends on drawn numbers, each with the chance that a correct library fails it.

A rate is that of the whole test function: all its parametrisations and comparisons together, over seeds. conftest.py
gives every test listed here the marker `statistical` and, with `--seed-offset` or EBM_LIT_SEED, fresh seeds;
test_false_alarms.py adds the rates up. What a wrong program would have to look like to be caught (power) stands in the
test's docstring or in POWER below, and where it is a claim of its own it is a test of its own, with mistakes planted on
purpose.

A test that draws numbers but would pass with any of them (the same noise on both sides of a comparison, bounds that
hold always) does not belong here.
"""

JOINT_FALSE_ALARM = 1e-4  # of everything below together

LEDGER: dict[str, dict[str, float]] = {
    "test_energy.py": {
        "test_initial_weights_have_pytorchs_default_law": 4e-8,
    },
    "test_data.py": {
        "test_samples_follow_the_density": 5e-6,
        "test_entropy_by_samples_and_by_grid": 2.4e-6,
        "test_rings_radius_has_the_stated_law": 1e-6,
    },
    "test_langevin.py": {
        "test_chain_follows_its_exact_law_in_20_settings": 2e-6,  # 80 tests, Bonferroni
        "test_double_well_is_sampled_with_small_steps": 1e-6,
        "test_uniform_init": 1e-7,
        "test_annealed_chains_on_a_spring_have_their_exact_variance": 8e-9,
        # here and below, of power: the chance to miss a mistake that was planted
        "test_power_the_same_test_catches_mistakes": 1e-7,
        "test_power_the_law_of_the_target_is_not_the_law_of_the_chain": 1e-8,
        "test_power_noise_shared_between_coordinates_is_caught": 1e-8,
    },
    "test_training.py": {
        "test_data_get_the_noise_of_their_negatives": 8e-9,
    },
    "test_evaluation_quality.py": {
        "test_kernel_distance_is_unbiased_and_its_p_value_uniform": 2.4e-6,
        "test_kernel_test_has_power": 1e-7,
        "test_independent_draws_are_worth_themselves": 1e-8,
        "test_memory_of_a_langevin_chain_on_a_spring": 1e-8,
    },
    "test_likelihood.py": {
        "test_rbm_samples_follow_the_mixture": 2e-7,
        "test_rbm_gradient_of_log_z_is_minus_the_mean_gradient_of_the_energy": 1e-7,
        "test_delta_method_covers_for_log_normal_weights": 1e-6,
        "test_bases_sample_what_they_say": 2e-7,
        "test_weights_are_unbiased_however_badly_the_chains_mix": 8e-7,
        "test_forward_underestimates_and_reverse_overestimates": 1e-9,
        "test_pilot_pulls_acceptance_to_its_optimum": 1e-6,
        "test_places_without_density_are_allowed": 3e-7,
        "test_ais_against_exact_log_z": 4e-6,
        "test_ais_of_a_50_dimensional_gaussian": 4e-7,
        "test_ais_of_50_dimensional_gaussians_in_full": 1.2e-6,  # slow
        "test_ais_at_other_temperatures": 6e-7,
        "test_intervals_cover": 5e-7,
        "test_500_intervals_cover": 1e-9,  # slow
        "test_mode_that_the_base_misses_opens_the_bracket": 1e-9,
        "test_samples_that_are_too_hot_open_the_bracket_the_other_way": 1e-8,
        "test_same_target_from_a_base_that_covers_it_is_certified": 4e-7,
        "test_what_passes_the_refusal_is_seldom_wrong": 1e-6,
        "test_dequantized_noise_is_uniform": 1e-7,
        "test_bits_bound_the_code_length_of_a_discretised_gaussian": 3e-7,
        "test_two_dimensional_network_against_quadrature": 3e-7,
    },
    "test_two_d_truth.py": {
        "test_held_out_points_agree_with_the_integral": 8e-7,
        "test_pairs_are_sharper_than_their_parts": 1e-6,
        "test_restarts_keep_the_law_they_are_offered_to": 3e-7,
        "test_the_gradient_of_the_recipe_is_that_of_the_oracle": 1e-9,
    },
    "test_mnist_density.py": {
        "test_reweighted_walkers_are_exact_however_far_they_lag": 5e-8,
        "test_log_z_adds_up_over_resampling": 1e-8,
        "test_power_work_alone_is_caught": 1e-7,
    },
    "test_mala.py": {
        "test_adaptation_reaches_its_target": 1e-9,
        "test_chains_keep_the_exact_law": 2e-6,  # 33 tests, Bonferroni
        "test_exact_samples_pass": 2e-6,
        "test_the_loop_for_mutants_without_a_mistake_passes": 6e-7,
        "test_power_mistakes_in_the_ratio_are_caught": 1e-7,
        "test_power_clamped_proposals_are_caught": 1e-8,
        "test_start_is_forgotten": 8e-7,
        "test_detailed_balance_of_single_steps": 1e-7,
        "test_geweke_joint_distribution": 1e-6,
        "test_power_geweke_catches_mistakes": 1e-7,
        "test_an_infinite_energy_is_a_wall": 2e-7,
        "test_what_mala_repairs": 6e-7,
    },
    "test_exact_laws.py": {
        "test_ula_on_the_double_well_has_the_law_of_its_kernel": 2e-6,
        "test_power_other_kernels_are_rejected": 1e-8,
        "test_ula_on_a_correlated_gaussian_from_a_fixed_start": 5e-7,
        "test_ula_remembers_as_its_kernel_says": 1e-7,
        "test_long_chains_give_the_exact_gradient_of_a_network": 1e-6,
        "test_long_chains_give_the_exact_gradient_of_the_enumerated_rbm": 1e-6,
        "test_cd_1_of_the_library_has_that_bias": 1.2e-7,
        "test_one_exact_step_from_the_model_has_no_bias": 6e-8,
    },
    "test_contrastive_divergence.py": {
        "test_every_slot_is_drawn_equally_often": 1e-7,
        "test_share_of_restarts_is_binomial": 4e-7,
        "test_ages_are_geometric": 4e-9,
        "test_restarts_by_age_follow_the_telescope": 1.2e-7,  # 59 checks
        "test_cd_k_shrinks_the_gradient_of_a_spring_and_keeps_its_sign": 6e-9,
        "test_long_chains_give_the_exact_gradient_of_a_spring": 2e-9,
        "test_persistent_chains_run_through_the_iterations": 2e-9,
        "test_long_chains_from_any_start_agree_with_the_exact_gradient_of_a_network": 1e-6,
    },
    "test_widgets.py": {
        "test_langevin_figure_compares_chains_with_the_exact_mean": 6e-7,
    },
}

# What is noticed at least 999 times in 1,000, of tests whose docstring does not say it. A comparison within z standard
# errors notices whatever is off by z + 3.1 of them; Kolmogorov's distance D, whatever is off by D + 1.95/√n.
POWER: dict[str, str] = {
    "test_initial_weights_have_pytorchs_default_law": "a bound that is wrong by a fifth in the smallest layer",
    "test_samples_follow_the_density": "samples that are stretched by 3 %, asserted there",
    "test_entropy_by_samples_and_by_grid": "0.04 nats",
    "test_rings_radius_has_the_stated_law": "distribution functions that differ by 0.021",
    "test_chain_follows_its_exact_law_in_20_settings": "the mistakes that the next test plants",
    "test_exact_samples_pass": "the mistakes that the tests after it plant",
    "test_adaptation_reaches_its_target": "an acceptance rate that is off by 0.07",
    "test_what_mala_repairs": "a variance that is off by 8 %; without repair it is off by 100 %",
    "test_data_get_the_noise_of_their_negatives": "noise that is wrong by 4 %",
    "test_ages_are_geometric": "a restart probability of 0.12 instead of 0.1",
    "test_restarts_by_age_follow_the_telescope": "a share that is off by 0.065",
    "test_cd_k_shrinks_the_gradient_of_a_spring_and_keeps_its_sign": "a gradient that is off by 0.03, of 0.25",
    "test_long_chains_give_the_exact_gradient_of_a_spring": "a gradient that is off by 6 %",
    "test_persistent_chains_run_through_the_iterations": "24 steps instead of 30",
    "test_long_chains_from_any_start_agree_with_the_exact_gradient_of_a_network": "chains of one step, asserted there",
    "test_langevin_figure_compares_chains_with_the_exact_mean": "a mean energy that is off by 13 %",
    "test_kernel_distance_is_unbiased_and_its_p_value_uniform": "p-values without the + 1: 30 of 600 would be zero",
    "test_independent_draws_are_worth_themselves": "an ESS that is wrong by a third, an R̂ that is wrong by 0.011",
    "test_memory_of_a_langevin_chain_on_a_spring": "a memory that is longer or shorter by half",
    "test_rbm_gradient_of_log_z_is_minus_the_mean_gradient_of_the_energy": "0.044 standard deviations",
    "test_bases_sample_what_they_say": "a mean that is off by 0.06 standard deviations, a variance by 9 %",
    "test_forward_underestimates_and_reverse_overestimates": "estimates without this bias",
    "test_pilot_pulls_acceptance_to_its_optimum": "a pilot that aims at 0.5 or 0.65",
    "test_places_without_density_are_allowed": "0.31 nats; a half line counted as a whole one is off by 0.69",
    "test_ais_of_a_50_dimensional_gaussian": "0.06 nats",
    "test_ais_of_50_dimensional_gaussians_in_full": "0.016, 0.036 and 0.061 nats",
    "test_ais_at_other_temperatures": "0.09 nats; a temperature that is missing somewhere is off by 1.4",
    "test_500_intervals_cover": "a coverage of 89.5 % or of 99 %",
    "test_mode_that_the_base_misses_opens_the_bracket": "a bracket that does not open",
    "test_samples_that_are_too_hot_open_the_bracket_the_other_way": "a bracket that is watched on one side only",
    "test_same_target_from_a_base_that_covers_it_is_certified": "a mode that is missing: log 2 nats",
    "test_dequantized_noise_is_uniform": "noise over less than 0.96 of a bin",
    "test_bits_bound_the_code_length_of_a_discretised_gaussian": "0.06 bits; the width of a bin, forgotten, is four",
    "test_two_dimensional_network_against_quadrature": "0.02 nats",
    "test_held_out_points_agree_with_the_integral": "0.06 nats where the log-ratio scatters by 1",
    "test_restarts_keep_the_law_they_are_offered_to": "a share that is off by 0.026",
}
