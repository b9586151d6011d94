"""The only door to private torch APIs: one function per need, each present in torch 2.11, 2.13 and 2.15 or guarded.

Nothing here knows what caching is. Whatever a new torch release renames is renamed in this package and nowhere else.
``offline`` and ``playing``, for GPUs that are not at hand, are imported where they are needed.
"""

from .collectives import any_of_ranks, default_group, is_collective, is_process_group, is_wait, sum_over, world_size
from .dynamo import (
    Frame,
    capture,
    capture_seconds,
    compile_options,
    compile_statistics,
    current_frame,
    is_resumed,
    is_symbolic,
    module_of,
    placeholder_source,
    raise_unwrapped,
    reset_compile_statistics,
    restart_dynamic,
    restart_static,
    root_modules,
    stops_at_break,
    trace_only,
)
from .inductor import (
    COND,
    FORCE_STRIDES,
    INVOKE_SUBGRAPH,
    SavedContext,
    cache_folder,
    compile_once,
    data_symbols,
    defined_symbols,
    depends_on_data,
    emit_number,
    fake_mode_of,
    flatten,
    flops,
    graph_module,
    has_triton,
    hint,
    inductor_keys,
    inductor_modes,
    input_index,
    is_view,
    is_wrapper,
    kernels_side_by_side,
    map_tensors,
    number_of,
    plain_inductor,
    save_context,
    storage_of,
    surely_contiguous,
    surely_strided_alike,
    trace,
    trace_artifact,
    unflatten,
)
from .memory import HeldStorage, addresses, has_trace, held_storage, is_rewritten, offsets, versions
from .stack import (
    ModuleCall,
    allow_captures,
    calling_module,
    calling_modules,
    codes_of,
    drop_captures,
    many_captures,
    traced_from,
)
