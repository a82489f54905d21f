"""HLO texts as XLA writes them, cut short."""

from fpq_jax.debug.compiled_program import Launch, Program

# ruff: noqa: E501
HLO = """HloModule jit_f

%nested (p0: f8e4m3fn[256,64]) -> f32[256,32] {
  %p0 = f8e4m3fn[256,64]{1,0} parameter(0)
  %p1 = f8e4m3fn[32,64]{1,0} parameter(1)
  ROOT %dot.1 = f32[256,32]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%gemm (p0: f8e4m3fn[256,64]) -> f32[256,32] {
  %p0 = f8e4m3fn[256,64]{1,0} parameter(0)
  %p1 = f8e4m3fn[32,64]{1,0} parameter(1)
  ROOT %fusion.9 = f32[256,32]{1,0} fusion(%p0, %p1), kind=kCustom, calls=%nested
}

%add (p: f32[256,32]) -> f32[256,32] {
  %p = f32[256,32]{1,0} parameter(0)
  ROOT %add.1 = f32[256,32]{1,0} add(%p, %p)
}

%scatter (p: f32[256,32]) -> f32[128,32] {
  %p = f32[256,32]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = f32[128,32]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%command_buffer (p: f32[256,32]) -> f32[256,32] {
  %p = f32[256,32]{1,0} parameter(0)
  %copy.3 = f32[256,32]{0,1} copy(%p)
  ROOT %sort.1 = f32[256,32]{1,0} sort(%copy.3), dimensions={1}, to_apply=%add
}

ENTRY %main.1 (x.1: f8e4m3fn[256,64], w.1: f8e4m3fn[32,64]) -> f32[256,32] {
  %x.1 = f8e4m3fn[256,64]{1,0} parameter(0)
  %w.1 = f8e4m3fn[32,64]{1,0} parameter(1), metadata={op_name="w"}
  %one = f32[] constant(1)
  %cublas.1 = (f32[256,32]{1,0}, s8[4194304]{0}) custom-call(%x.1, %w.1, %one, %one), custom_call_target="__cublas$lt$matmul$f8", metadata={op_name="jit(f)/dot_general" stack_frame_id=1}
  %gte.1 = f32[256,32]{1,0} get-tuple-element(%cublas.1), index=0
  %c.1 = bf16[256,32]{1,0} fusion(%gte.1), kind=kLoop, calls=%add, metadata={op_name="jit(f)/lorc/convert"}
  %cublas.2 = (bf16[256,256]{1,0}, s8[4194304]{0}) custom-call(%c.1, %c.1), custom_call_target="__cublas$lt$matmul"
  %fusion.1 = f32[256,32]{1,0} fusion(%x.1, %w.1), kind=kCustom, calls=%gemm, metadata={op_name="jit(f)/attention/dot_general"}
  %bitcast.1 = f32[8192]{0} bitcast(%fusion.1)
  %all-reduce-start.1 = f32[256,32]{1,0} all-reduce-start(%fusion.1), channel_id=1, replica_groups={{0,1}}, to_apply=%add, metadata={op_name="jit(f)/psum"}
  %all-reduce-done.1 = f32[256,32]{1,0} all-reduce-done(%all-reduce-start.1)
  %all-gather-start.1 = ((s32[16]{0}, f32[16]{0}), (s32[32]{0}, f32[32]{0})) all-gather-start(%x.1, %x.1), dimensions={0}
  %all-gather-done.1 = (s32[32]{0}, f32[32]{0}) all-gather-done(%all-gather-start.1)
  %scattered.1 = ((f32[256,32]{1,0}), f32[128,32]{1,0}) async-start(%fusion.1), calls=%scatter
  %scattered.2 = f32[128,32]{1,0} async-done(%scattered.1)
  ROOT %call.1 = f32[256,32]{1,0} call(%fusion.1), to_apply=%command_buffer
}
"""


class Compiled:
    def as_text(self):
        return HLO

    def memory_analysis(self):
        return type("Memory", (), {"temp_size_in_bytes": 5, "argument_size_in_bytes": 6, "alias_size_in_bytes": 7})


def test_kernels_and_the_products_among_them():
    program = Program.of(Compiled(), "ptx")
    kinds = [k.kind for k in program.launches]
    assert kinds == ["fp8_matmul", "fusion", "matmul", "fp8_matmul", *["collective"] * 3, "copy", "other"]
    # each once, however it is started
    assert [(k.op, k.output) for k in program.launches[4:7]] == [
        ("all-reduce", "f32[256,32]"),
        ("all-gather", "((s32[16], f32[16]), (s32[32], f32[32]))"),
        ("reduce-scatter", "f32[128,32]"),
    ]
    assert program.launches[4].scope == "jit(f)/psum"
    assert program.launches[0] == Launch(
        "fp8_matmul",
        "cublas.1",
        "jit(f)/dot_general",
        "(f32[256,32], s8[4194304])",
        ("f8e4m3fn[256,64]", "f8e4m3fn[32,64]"),
        "custom-call",
    )
    # what lost its name is from where its operand is from
    assert program.matmuls("matmul")[0].scope == "jit(f)/lorc/convert" and not program.matmuls("matmul", but=("lorc",))
    assert len(program.matmuls("fp8_matmul", but=("attention",))) == 1
    assert (program.temp_bytes, program.argument_bytes, program.alias_bytes, program.ptx) == (5, 6, 7, "ptx")
    assert str(program) == (
        "9 launches: 2 FP8 products, 1 other products (1 in lorc), 1 fusions, 1 copies, 3 collectives, 1 others; "
        "6 bytes of arguments, 5 of temporaries"
    )
