"""GPUs as their compiler wants to hear of them: the text of a `GpuTargetConfigProto`."""

_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_bandwidth}
  device_memory_size: {memory}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 7 }}
device_description_str: "{name}"
"""

TARGETS = {
    'h200': _HOPPER.format(memory_bandwidth=4_800_000_000_000, memory=141_000_000_000, name='NVIDIA H200'),
}
