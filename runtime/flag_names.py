"""Other programs' names of our flags, for the message about an unknown flag.

    hint_for("lr", known)  # "did you mean --learning_rate?"

A name in these tables is never guessed by its spelling: "resolution" is spelled like "prediction".
The names are those of diffusers, DiT, SiT, EDM, torchtitan, kohya's sd-scripts, timm and Lightning.
They are compared in lower case, without "_", "-" and "."; of a dotted name the last part counts if
the whole is not in the tables.
"""

import difflib
import re
from collections.abc import Collection, Mapping

# The flags of each command → other names of them. A second word is the value to give.
TRAINING = {
    "dataset_name": "dataset data data_name dataset_id hf_dataset dataset_key task",
    "dataset_name folder:PATH": "data_path train_data_dir train_data_path train_dir data_root "
    "root root_dir dataset_path dataset_dir image_dir images_dir image_folder imagefolder img_dir "
    "instance_data_dir input_dir datadir train_path",
    "image_column": "image_key image_col img_column img_key",
    "label_column": "label_key label_col labels_column class_column class_key label_field",
    "caption_column": "text_column caption_key caption_col captions_column text_key prompt_column "
    "text_field",
    "image_size": "resolution size img_size image_resolution input_size res image_dim crop_size "
    "train_resolution target_size height width sidelength",
    "crop": "center_crop centre_crop",
    "crop random": "random_crop",
    "crop letterbox": "letterbox pad padding pad_to_square pad_images keep_aspect_ratio "
    "preserve_aspect_ratio",
    "channels": "in_channels num_channels n_channels image_channels img_channels in_chans",
    "latents": "feature_path features_path features_dir latent_dir latents_dir latent_path "
    "latents_path cache_latents precomputed_latents encoded_dir",
    "vae": "vae_path vae_ckpt vae_model vae_id pretrained_vae autoencoder first_stage "
    "pretrained_vae_model_name_or_path vae_model_name_or_path",
    "text_towers": "text_encoder text_encoders text_encoder_path text_model clip clip_model t5 "
    "tokenizer tokenizer_name",
    "text_length": "max_token_length max_sequence_length tokenizer_max_length max_text_length "
    "max_length context_length seq_len",
    "conditioning": "conditional class_cond class_conditional cond condition",
    "streaming": "stream streamed",
    "n_workers": "workers num_workers dataloader_num_workers data_loader_workers j "
    "max_data_loader_n_workers loader_workers num_data_workers nworkers",
    "shuffle_buffer": "buffer_size shuffle_buffer_size shuffle_size",
    "in_memory": "preload cache_dataset in_ram cache_images keep_in_memory",
    "model": "arch architecture model_name model_type model_size model_flavor flavor backbone "
    "net network network_type transformer",
    "init_from": "pretrained pretrained_model pretrained_path pretrained_model_name_or_path ckpt "
    "checkpoint ckpt_path checkpoint_path weights load_from load_weights finetune finetune_from "
    "init_ckpt initial_load_path transfer restore_from base_model init_checkpoint",
    "lora_rank": "lora use_lora lora_r lora_dim network_dim network_module adapter",
    "lora_alpha": "network_alpha",
    "lora_targets": "lora_layers lora_target_modules target_modules",
    "align": "repa enc_type",
    "align_at": "encoder_depth",
    "align_weight": "proj_coeff repa_weight",
    "patch_size": "patch patchsize",
    "remat": "gradient_checkpointing grad_checkpointing grad_checkpoint grad_ckpt "
    "activation_checkpointing activation_checkpoint activation_checkpoint_mode checkpointing "
    "checkpoint_activations recompute rematerialize ac_mode",
    "half_precision": "mixed_precision precision amp dtype weight_dtype param_dtype autocast "
    "half mixed_precision_param compute_dtype use_amp",
    "half_precision bf16": "bf16 bfloat16 full_bf16",
    "half_precision fp16": "fp16 float16 full_fp16",
    "half_precision false": "fp32 float32 full_precision",
    "objective": "method loss loss_type diffusion_type framework algorithm training_objective "
    "diffusion path_type path model_objective",
    "prediction": "prediction_type pred_type predict parameterization parametrization target "
    "model_mean_type mean_type output_type model_prediction_type",
    "prediction v": "v_parameterization v_prediction v_pred",
    "prediction epsilon": "predict_epsilon epsilon_prediction eps_prediction",
    "prediction x0": "predict_xstart predict_x0",
    "learned_sigma": "learn_sigma learn_variance learned_variance",
    "min_snr_gamma": "snr_gamma min_snr",
    "label_dropout": "class_dropout_prob class_dropout cfg_dropout cfg_dropout_prob cfg_prob "
    "caption_dropout caption_dropout_rate caption_dropout_prob proportion_empty_prompts "
    "uncond_prob p_uncond puncond unconditional_prob cond_drop_prob conditioning_dropout "
    "conditioning_dropout_prob label_dropout_prob label_drop drop_label_prob uncond_p cond_dropout",
    "time_density": "weighting_scheme timestep_sampling time_sampling timestep_sampler "
    "t_distribution time_distribution noise_distribution timestep_density",
    "time_shift": "discrete_flow_shift flow_shift timestep_shift noise_shift",
    "logit_mean": "p_mean lognormal_mean",
    "logit_std": "p_std lognormal_std",
    "n_epochs": "epochs epoch num_epochs num_train_epochs max_epochs max_train_epochs nb_epochs "
    "total_epochs train_epochs nepochs",
    "n_steps": "steps step max_steps max_train_steps num_steps num_train_steps train_steps "
    "training_steps total_steps iterations iters max_iters max_iter num_iterations num_iters "
    "n_iters niter total_iters max_iterations train_iters num_updates",
    "batch_size": "bs b batch batchsize train_batch_size global_batch_size total_batch_size "
    "training_batch_size effective_batch_size train_bs",
    "accumulate_steps": "gradient_accumulation_steps gradient_accumulation grad_accum "
    "grad_accum_steps gradient_accumulate accum_iter accum accum_steps accumulation_steps "
    "accumulate_grad_batches n_accum update_freq",
    "learning_rate": "lr base_lr peak_lr max_lr unet_lr init_lr blr initial_lr optimizer_lr "
    "transformer_lr lrate",
    "schedule": "lr_scheduler lr_schedule lr_scheduler_type scheduler lr_decay lr_policy sched "
    "decay_type lr_decay_type",
    "warmup_steps": "lr_warmup_steps lr_warmup warmup num_warmup_steps warmup_iters warmup_iter "
    "warmup_updates lr_rampup",
    "beta1": "adam_beta1 b1 betas adam_betas opt_betas",
    "beta2": "adam_beta2 b2 betas adam_betas opt_betas",
    "optimizer": "optim optimizer_type opt optimizer_name",
    "weight_decay": "wd adam_weight_decay decay l2 adamw_weight_decay",
    "clip_norm": "max_grad_norm grad_clip grad_clip_norm gradient_clip gradient_clip_val "
    "gradient_clipping clip_grad clip_grad_norm clip clip_gradients max_norm clipping grad_norm",
    "ema_decay": "ema_rate ema_beta ema_max_decay ema_momentum ema_halflife ema_half_life "
    "model_ema_decay ema_decay_rate",
    "ema_std": "ema_stds sigma_rel sigma_rels ema_sigma ema_sigmas phema posthoc_ema post_hoc_ema",
    "mup": "base_width mup_base_width mup_base use_mup mup_width",
    "seed": "manual_seed global_seed random_seed rng_seed noise_seed",
    "fsdp": "shard sharding fsdp_size fsdp_degree dp_shard zero zero_stage n_shards num_shards "
    "data_parallel_shard_degree fsdp_devices use_fsdp",
    "distributed": "multihost multi_host multi_node multinode multi_gpu ddp use_ddp launcher dist",
    "coordinator": "coordinator_address master_addr master_address master_port main_process_ip "
    "main_process_port rdzv_endpoint dist_url init_method",
    "n_processes": "world_size num_processes process_count nprocs num_hosts nnodes num_nodes "
    "num_machines nodes n_nodes n_hosts",
    "process_index": "rank node_rank machine_rank process_id global_rank host_id process_rank",
    "run_dir": "output_dir out_dir outdir out output results_dir result_dir logging_dir log_dir "
    "logdir workdir work_dir save_dir save_path exp_dir experiment_dir dump_folder output_path o "
    "checkpoint_folder checkpoint_dir ckpt_dir checkpoints_dir run_name exp_name experiment_name "
    "experiment name exp run job_name output_name default_root_dir",
    "resume": "resume_from_checkpoint resume_from auto_resume resume_path resume_ckpt "
    "resume_checkpoint resume_training continue restart resume_run continue_training",
    "log_every": "log_interval logging_steps log_freq log_steps print_freq print_every "
    "log_every_n_steps logging_interval display_freq print_interval",
    "eval_save_steps": "save_every save_steps save_interval save_freq save_every_n_steps "
    "checkpointing_steps checkpoint_steps checkpoint_every checkpoint_interval checkpoint_freq "
    "ckpt_every ckpt_interval snap snapshot save_step_interval eval_every "
    "eval_interval eval_freq eval_steps eval_every_n_steps validation_steps validation_interval "
    "val_every val_interval val_check_interval val_freq save_model_every save_checkpoint_every",
    "n_eval_batches": "eval_batches eval_iters limit_val_batches val_batches num_eval_batches",
    "sample_every_n": "sample_every sample_every_n_steps sample_interval sample_freq log_images "
    "log_images_every image_interval visualize_every save_and_sample_every vis_every preview_every",
    "keep_checkpoints": "checkpoints_total_limit save_total_limit save_last_n_steps keep_latest_k "
    "checkpoint_keep_latest_k keep_last keep_last_n max_to_keep save_top_k max_checkpoints",
    "wandb_project": "wandb use_wandb report_to log_with project project_name wandb_project_name "
    "tracker_project_name wandb_dir logger tracker",
    "cfg_scale": "cfg guidance_scale guidance guidance_weight cfg_weight cfg_strength "
    "unconditional_guidance_scale classifier_free_guidance scale w cfgscale cond_scale",
    "n_sample_steps": "num_inference_steps num_sampling_steps sample_steps sampling_steps "
    "inference_steps n_sampling_steps num_sample_steps ddim_steps nfe sampling_timesteps",
    "solver": "sampler sampler_name sampling_method sample_method ode_solver sample_sampler "
    "noise_scheduler sampling_algorithm sample_solver",
    "sample_shift": "sampling_shift",
    "fid_every": "eval_fid fid_freq fid_interval fid_every_n_steps calc_fid calculate_fid",
    "fid_reference": "fid_stats fid_ref fid_statistics fid_stats_path dataset_stats ref_stats "
    "reference",
    "fid_n": "num_fid_samples fid_num_samples fid_samples n_fid_samples num_fid",
    "inception": "inception_path inception_weights detector detector_url",
    "overfit_batch": "overfit overfit_batches overfit_one_batch fast_dev_run",
    "lr_range_test": "lr_find lr_finder auto_lr_find find_lr lr_finder_test",
    "profile": "profiler profiling enable_profiling profile_steps",
}
AUTOENCODER = {
    "kl_weight": "beta kl kl_coef kl_scale kl_lambda",
    "gan_weight": "disc_weight disc discriminator_weight adversarial_weight adv_weight",
    "gan_start": "disc_start discriminator_start adversarial_start",
    "lpips_weight": "perceptual_weight perceptual lpips_scale",
    "latent_channels": "z_channels latent_dim embed_dim z_dim",
}
SAMPLING = {
    "run": "run_dir run_folder run_path experiment exp_dir experiment_dir model_dir logdir log_dir "
    "workdir output_dir train_dir network ckpt checkpoint ckpt_path checkpoint_path "
    "checkpoint_dir ckpt_dir model_path weights load_from resume resume_from model model_name "
    "load_weights",
    "pretrained": "ckpt checkpoint ckpt_path checkpoint_path model_path weights load_from "
    "pretrained_model pretrained_path pretrained_model_name_or_path model_id hub_id repo_id model "
    "model_name hf_model init_from load_weights",
    "ema": "use_ema ema_model load_ema use_ema_weights model_ema",
    "ema_std": "sigma_rel ema_sigma phema posthoc_ema post_hoc_ema",
    "step": "checkpoint_step ckpt_step iteration global_step epoch training_step",
    "labels": "class_labels class_label label class_name class_names class_ids class_id y classes "
    "class target_class class_idx class_cond categories",
    "prompts": "prompt text texts caption captions prompt_file",
    "negative_prompt": "negative negative_prompts neg_prompt n_prompt uncond_prompt",
    "size": "image_size resolution img_size image_resolution height width",
    "n": "num_samples n_samples num_images n_images num nsamples num_fid_samples n_sample "
    "num_images_per_prompt images_per_prompt batch_count num_sample num_generate num_outputs "
    "fid_num_samples fid_samples count fid_n",
    "seed": "",
    "out": "output out_dir outdir output_dir output_path output_file out_path save_path save_dir "
    "sample_dir samples_dir save_to o fname dest destination",
    "n_steps": "steps num_steps num_inference_steps num_sampling_steps sample_steps "
    "sampling_steps inference_steps n_sample_steps ddim_steps nfe timesteps num_timesteps "
    "sampling_timesteps timestep_respacing",
    "solver": "scheduler method",
    "shift": "timestep_shift flow_shift time_shift sample_shift discrete_flow_shift mu "
    "sampling_shift",
    "interval": "guidance_interval cfg_interval guidance_low guidance_high guidance_range "
    "cfg_range",
    "eta": "ddim_eta stochasticity",
    "cfg_sweep": "cfg_scales guidance_scales",
    "batch_size": "per_proc_batch_size eval_batch_size sample_batch_size batch_gpu max_batch_size "
    "fid_batch_size",
    "vae": "",
    "trajectory": "gif save_trajectory animation video",
}
EVALUATION = {
    "images": "image_dir images_dir image_folder img_dir fake fake_dir gen_dir generated samples "
    "sample_dir samples_dir path folder",
    "npz": "sample_batch samples_npz sample_file",
    "reference": "ref ref_path ref_batch ref_stats fid_stats fid_ref stats real real_dir "
    "dataset_stats fid_reference fid_statistics",
    "make_reference": "save_stats save_statistics make_stats",
    "features": "fid_features feature_space",
    "n_features": "num_features",
    "split": "dataset_split data_split",
}
CONVERSION = {
    "mirror": "hflip flip random_flip horizontal_flip random_hflip",
    "verify": "check validate",
}
EXPORT = {"layout": "format export_format"}
PAGE = {
    "runs": "runs_dir results_dir",
    "host": "server_name listen ip address server_host",
    "port": "server_port",
    "share": "public gradio_share",
}
TABLES = {
    "train.py": TRAINING,
    "train_vae.py": AUTOENCODER,
    "generate.py": SAMPLING,
    "evaluate.py": EVALUATION,
    "convert_imagenet.py": CONVERSION,
    "export.py": EXPORT,
    "demo.py": PAGE,
}

# Why no flag here stands for a name → the names.
REASONS = {
    "the classes are counted in the dataset's label column, and a trained model knows them": (
        "num_classes n_classes nb_classes class_num number_of_classes label_dim"
    ),
    "class names are read from the dataset": "class_labels_file class_names_file",
    "a trained model makes images of the size that it was trained on; generate.py has --size": (
        "image_size resolution size img_size image_resolution height width"
    ),
    "training always averages the weights (EMA); --ema_decay sets how slowly": (
        "use_ema ema ema_model model_ema"
    ),
    "weights are averaged at every step; only --ema_decay and --ema_std can be set": (
        "ema_start ema_warmup ema_update_after_step ema_inv_gamma ema_power ema_update_every "
        "update_ema_every step_start_ema"
    ),
    "--learning_rate, --beta1, --beta2, --weight_decay and --moments are AdamW's settings": (
        "use_8bit_adam optimizer_args"
    ),
    "AdamW's epsilon is fixed; --beta1 and --beta2 can be set": (
        "adam_epsilon adam_eps eps epsilon momentum amsgrad"
    ),
    "--schedule cosine, linear and wsd fall to 0, constant does not fall": (
        "min_lr lr_min eta_min end_lr lr_end lr_num_cycles num_cycles lr_power lr_cycles "
        "lr_step_size lr_gamma final_lr"
    ),
    "give the warmup in steps, by --warmup_steps": (
        "warmup_ratio lr_warmup_ratio warmup_epochs warmup_fraction"
    ),
    "the learning rate is used as given, by --learning_rate": "scale_lr auto_scale_lr",
    "--batch_size counts the images of all devices together": (
        "per_device_train_batch_size local_batch_size micro_batch_size per_gpu_batch_size "
        "batch_size_per_gpu batch_size_per_device train_batch_size_per_gpu "
        "per_device_batch_size batch_gpu device_batch_size"
    ),
    "evaluation takes batches of --batch_size too": (
        "eval_batch_size val_batch_size per_device_eval_batch_size validation_batch_size"
    ),
    "give it in steps, by --eval_save_steps or --sample_every_n": (
        "save_every_n_epochs checkpointing_epochs save_model_epochs save_epochs eval_epochs "
        "check_val_every_n_epoch validation_epochs sample_every_n_epochs save_images_epochs"
    ),
    "give the length of training by --n_steps or --n_epochs": "total_kimg kimg duration train_kimg",
    "training has no time limit; SIGTERM saves and ends it": (
        "time_budget max_time max_train_time walltime"
    ),
    "the samples of a run take captions of the evaluation split": (
        "validation_prompt validation_prompts sample_prompts"
    ),
    "text encoders are not trained": "train_text_encoder text_encoder_lr unfreeze_text_encoder",
    "train_vae.py trains an autoencoder": "train_vae train_autoencoder",
    "the models have no dropout of activations": (
        "dropout attention_dropout attn_dropout drop_path drop_rate dropout_rate"
    ),
    "the width, depth and heads are those of the preset that --model names": (
        "hidden_size hidden_dim width depth num_heads n_heads num_layers n_layers dim mlp_ratio "
        "n_layer n_head model_channels num_blocks embed_dim n_embd"
    ),
    "rectified flow has continuous time, DDPM the linear schedule of 1000 steps": (
        "diffusion_steps beta_schedule noise_schedule num_train_timesteps beta_start beta_end "
        "num_diffusion_timesteps num_timesteps timesteps"
    ),
    "the noise is standard normal, without an offset": (
        "noise_offset input_perturbation multires_noise_iterations offset_noise"
    ),
    "the method weights its loss; DDPM takes --min_snr_gamma": ("loss_weight loss_weighting"),
    "sampling integrates the whole interval with the fixed steps of --solver": (
        "train_eps sample_eps t_eps last_step last_step_size sde ode diffusion_form atol rtol"
    ),
    "training always shuffles, evaluation never does": "shuffle no_shuffle",
    "batches are always prefetched": (
        "pin_memory pin_mem prefetch prefetch_factor persistent_workers "
        "persistent_data_loader_workers"
    ),
    "images are cropped (--crop) and resized; the dataset's entry in datasets_config.py says if "
    "they are mirrored": (
        "random_flip hflip flip horizontal_flip random_hflip mirror xflip flip_aug augment "
        "augmentation color_jitter"
    ),
    "a run takes its whole training split": (
        "max_train_samples limit_train_batches subset num_train_samples max_samples"
    ),
    "a process uses every device that it sees; CUDA_VISIBLE_DEVICES chooses among GPUs": (
        "gpu gpus gpu_id gpu_ids gpu_num num_gpus n_gpus n_gpu ngpu devices device_ids "
        "n_devices num_devices nproc_per_node local_rank"
    ),
    "JAX takes the GPU or TPU if there is one; JAX_PLATFORMS=cpu chooses the CPU": (
        "device accelerator platform use_cpu cpu cuda use_cuda no_cuda"
    ),
    "weights and batches are split over devices by --fsdp alone": (
        "tp pp tensor_parallel pipeline_parallel tensor_parallel_degree "
        "pipeline_parallel_degree context_parallel_degree data_parallel_replicate_degree "
        "sequence_parallel deepspeed"
    ),
    "XLA compiles and fuses everything; there is nothing to switch on": (
        "compile torch_compile use_compile xformers use_xformers sdpa flash_attn "
        "flash_attention attn_mode enable_xformers_memory_efficient_attention cudnn_benchmark "
        "mem_eff_attn fused"
    ),
    "--half_precision computes in bfloat16; JAX chooses the rest": (
        "allow_tf32 tf32 matmul_precision"
    ),
    "TensorBoard's files are always written into the run's folder": (
        "tensorboard use_tensorboard tb tensorboard_dir tb_log enable_tensorboard"
    ),
    "set WANDB_ENTITY, WANDB_NAME or WANDB_MODE; --wandb_project logs there": (
        "wandb_entity entity wandb_name wandb_run_name wandb_mode wandb_id wandb_group wandb_tags"
    ),
    "nothing is uploaded; export.py writes a folder for `hf upload`": (
        "push_to_hub hub_model_id hub_token upload hub_strategy"
    ),
    "set HF_HOME and HF_TOKEN for the hub; of a repository its newest revision is read": (
        "revision variant cache_dir hf_token token"
    ),
    "generate.py samples from a run, and evaluate.py measures it": (
        "eval_only evaluate_only test_only sample_only inference test do_eval"
    ),
    "nothing is offloaded; a smaller --batch_size takes less memory": (
        "tile tiled_vae vae_tiling enable_vae_slicing enable_model_cpu_offload cpu_offload offload"
    ),
}
SWITCHES = ("no", "use", "enable", "disable", "do", "with")  # before the name of a switch


def hint_for(name: str, known: Collection[str]) -> str:
    """Return what a message about an unknown flag goes on with: the flag that is meant, why there
    is none, or the flag that is spelled alike.

    Args:
        name: without the dashes before it.
        known: the flags of the command.
    """
    if hint := hint_from_tables(name, known):
        return hint
    if nearest := _spelled_alike(name, known):
        return f"did you mean --{nearest}?"
    return "--help lists them all"


def hint_from_tables(name: str, known: Collection[str]) -> str | None:
    """Return the flag of the command that is meant, the reason why there is none, or the command
    that has it; None if the name is in no table.

    Args:
        name: without the dashes before it.
        known: the flags of the command.
    """
    for key in _keys_of(name):
        if same := [flag for flag in known if _normalize(flag) == key]:
            return f"did you mean --{same[0]}?"
        for table in TABLES.values():
            # The value may be a part of the name: "fp16" for --half_precision fp16.
            if meant := [flag for flag in _flags_named(key, table) if flag.split()[0] in known]:
                return f"did you mean {' or '.join(f'--{flag}' for flag in meant)}?"
        for reason, names in REASONS.items():
            if key in _normalized(names):
                return reason
        for command, table in TABLES.items():
            meant = _flags_named(key, table)
            if meant and len(key) > 1:  # a single letter stands for too much
                return f"--{meant[0].split()[0]} is a flag of {command}"
    return None


def _keys_of(name: str) -> list[str]:
    """Return the keys to look up, the most exact first: the name, and what a switch switches."""
    parts = [name, name.rpartition(".")[2]]
    switched = [re.sub(rf"^({'|'.join(SWITCHES)})[_-]?", "", part) for part in parts]
    return list(dict.fromkeys(_normalize(part) for part in (*parts, *switched)))


def _flags_named(key: str, table: Mapping[str, str]) -> list[str]:
    return [
        flag
        for flag, names in table.items()
        if key == _normalize(flag) or key in _normalized(names)
    ]


def _normalize(name: str) -> str:
    return re.sub(r"[-_.]", "", name.lower())


def _normalized(names: str) -> set[str]:
    return {_normalize(name) for name in names.split()}


def _spelled_alike(name: str, known: Collection[str]) -> str | None:
    """Find the flag that differs by a typing error or two; "steps" is spelled like "n_steps"."""
    spellings = {flag.removeprefix("n_"): flag for flag in known} | {flag: flag for flag in known}
    nearest = difflib.get_close_matches(name, spellings, n=1, cutoff=0.75)
    return spellings[nearest[0]] if nearest else None
