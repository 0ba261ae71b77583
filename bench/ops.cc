#include "bench/ops.h"

#include <utility>

#include "bench/cases.h"
#include "ops/adamw.h"
#include "ops/attention.h"
#include "ops/cross_entropy.h"
#include "ops/delta_scan.h"
#include "ops/delta_step.h"
#include "ops/embedding.h"
#include "ops/grouped_rms_norm.h"
#include "ops/linear.h"
#include "ops/linear_swiglu.h"
#include "ops/mixer_scan.h"
#include "ops/mixer_step.h"
#include "ops/rms_norm.h"
#include "ops/rotary.h"
#include "ops/sample.h"
#include "ops/short_conv.h"
#include "ops/swiglu.h"

// The bytes of a row are those of the tensors that a call must read and write once, the FLOPs those
// of its matrix products; a backward that recomputes is not credited for it. `act` is the type of
// activations, which the ops' headers tell from what is always f32.

namespace mamba3::bench {

namespace {

double product(std::initializer_list<int64_t> factors) {
  double result = 1;
  for (const int64_t factor : factors) result *= static_cast<double>(factor);
  return result;
}

double bytes_of(std::initializer_list<int64_t> dims, DType dtype = DType::f32) {
  return product(dims) * static_cast<double>(size_of(dtype));
}

// A matrix whose rows have a gap behind them if asked.
View rows(Buffers& buffers, DType dtype, int64_t M, int64_t N, bool strided) {
  return buffers.normal({M, N + (strided ? kRowGap : 0)}, dtype).slice(1, 0, N);
}

Benchmark embedding_forward(DType, const EmbeddingCase& c) {
  return {.op = "embedding",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = bytes_of({c.M, c.D}, c.dtype) + bytes_of({c.M, c.D}), .flops = 0},
          .prepare = [c](Buffers& buffers) -> Call {
            const EmbeddingArgs args{.ids = buffers.integers({c.M}, 0, c.V),
                                     .weight = buffers.zeros({c.V, c.D}, c.dtype),
                                     .out = buffers.zeros({c.M, c.D})};
            return [args](Context& ctx) { embedding(ctx, args); };
          }};
}

Benchmark embedding_gradient(DType, const EmbeddingCase& c) {
  return {.op = "embedding_backward",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = 3 * bytes_of({c.M, c.D}), .flops = 0},
          .prepare = [c](Buffers& buffers) -> Call {
            const EmbeddingBackwardArgs args{.ids = buffers.integers({c.M}, 0, c.V),
                                             .d_out = buffers.normal({c.M, c.D}),
                                             .d_weight = buffers.zeros({c.V, c.D})};
            return [args](Context& ctx) { embedding_backward(ctx, args); };
          }};
}

Benchmark rms_norm_forward(DType act, const RmsNormCase& c) {
  return {.op = "rms_norm",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = (c.delta ? 2 : 1) * (bytes_of({c.M, c.D}) + bytes_of({c.M, c.D}, act)),
                   .flops = 0},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const View residual = buffers.normal({c.M, c.D});
            const RmsNormArgs args{.residual = residual,
                                   .delta = c.delta ? buffers.zeros({c.M, c.D}, act) : View{},
                                   .weight = buffers.normal({c.D}),
                                   .residual_out = c.delta ? residual : View{},
                                   .out = buffers.zeros({c.M, c.D}, act),
                                   .rstd = buffers.zeros({c.M})};
            return [args](Context& ctx) { rms_norm(ctx, args); };
          }};
}

Benchmark rms_norm_gradient(DType act, const RmsNormCase& c) {
  return {.op = "rms_norm_backward",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = 3 * bytes_of({c.M, c.D}) + bytes_of({c.M, c.D}, act), .flops = 0},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const RmsNormBackwardArgs args{.residual = buffers.normal({c.M, c.D}),
                                           .weight = buffers.normal({c.D}),
                                           .rstd = buffers.zeros({c.M}),
                                           .d_out = buffers.normal({c.M, c.D}, act),
                                           .d_residual = buffers.zeros({c.M, c.D}),
                                           .d_weight = buffers.zeros({c.D})};
            return [args](Context& ctx) { rms_norm_backward(ctx, args); };
          }};
}

Benchmark grouped_rms_norm_forward(DType act, const GroupedRmsNormCase& c) {
  return {.op = "grouped_rms_norm",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = 2 * bytes_of({c.M, c.C}, act), .flops = 0},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const GroupedRmsNormArgs args{.groups = c.groups,
                                          .x = buffers.normal({c.M, c.C}, act),
                                          .weight = buffers.normal({c.C}),
                                          .out = buffers.zeros({c.M, c.C}, act)};
            return [args](Context& ctx) { grouped_rms_norm(ctx, args); };
          }};
}

Benchmark grouped_rms_norm_gradient(DType act, const GroupedRmsNormCase& c) {
  return {.op = "grouped_rms_norm_backward",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = 3 * bytes_of({c.M, c.C}, act), .flops = 0},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const GroupedRmsNormBackwardArgs args{.groups = c.groups,
                                                  .x = buffers.normal({c.M, c.C}, act),
                                                  .weight = buffers.normal({c.C}),
                                                  .d_out = buffers.normal({c.M, c.C}, act),
                                                  .d_x = buffers.zeros({c.M, c.C}, act),
                                                  .d_weight = buffers.zeros({c.C})};
            return [args](Context& ctx) { grouped_rms_norm_backward(ctx, args); };
          }};
}

double linear_bytes(DType act, const LinearCase& c) {
  return bytes_of({c.M, c.K}, act) + bytes_of({c.N, c.K}, c.dtype) +
         (c.accumulate ? 2 : 1) * bytes_of({c.M, c.N}, act);
}

Benchmark linear_forward(DType act, const LinearCase& c) {
  return {.op = c.M <= 8 ? "linear_decode" : "linear",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = linear_bytes(act, c), .flops = 2 * product({c.M, c.N, c.K})},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const LinearArgs args{.x = rows(buffers, act, c.M, c.K, c.strided),
                                  .weight = buffers.normal({c.N, c.K}, c.dtype),
                                  .bias = c.bias ? buffers.normal({c.N}) : View{},
                                  .y = rows(buffers, act, c.M, c.N, c.strided),
                                  .accumulate = c.accumulate};
            return [args](Context& ctx) { linear(ctx, args); };
          }};
}

Benchmark linear_gradient(DType act, const LinearCase& c) {
  return {.op = "linear_backward",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = 2 * linear_bytes(act, c) + bytes_of({c.N, c.K}),
                   .flops = 4 * product({c.M, c.N, c.K})},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const LinearBackwardArgs args{.x = rows(buffers, act, c.M, c.K, c.strided),
                                          .weight = buffers.normal({c.N, c.K}, c.dtype),
                                          .d_y = rows(buffers, act, c.M, c.N, c.strided),
                                          .d_x = rows(buffers, act, c.M, c.K, c.strided),
                                          .d_weight = buffers.zeros({c.N, c.K}),
                                          .d_bias = c.bias ? buffers.zeros({c.N}) : View{},
                                          .accumulate_d_x = c.accumulate};
            return [args](Context& ctx) { linear_backward(ctx, args); };
          }};
}

MixerParams mixer_params(Buffers& buffers, const MixerShape& s) {
  const auto low_rank = [&] { return s.mimo ? buffers.normal({s.H, s.R, s.P}) : View{}; };
  const auto bias = [&] { return s.bc_bias ? buffers.normal({s.H, s.R, s.N}) : View{}; };
  const auto norm = [&] { return s.bc_norm ? buffers.normal({s.N}) : View{}; };
  return {.dt_bias = buffers.normal({s.H}),
          .A_log = s.has_dd_A() ? View{} : buffers.normal({s.H}),
          .B_bias = bias(),
          .C_bias = bias(),
          .B_norm = norm(),
          .C_norm = norm(),
          .D = buffers.normal({s.H}),
          .mimo_x = low_rank(),
          .mimo_z = low_rank(),
          .mimo_o = low_rank(),
          .norm = s.out_norm ? buffers.normal({s.H, s.P}) : View{}};
}

MixerState mixer_state(Buffers& buffers, const MixerShape& s, int64_t sequences) {
  return {.angle = buffers.zeros({sequences, s.H, s.S}),
          .ssm = buffers.zeros({sequences, s.H, s.P, s.N}),
          .k_prev = buffers.zeros({sequences, s.R, s.H, s.N}),
          .v_prev = buffers.zeros({sequences, s.H, s.P}),
          .rows = buffers.range(sequences)};
}

double tokens_bytes(DType act, const MixerCase& c) {
  return bytes_of({c.B, c.T, c.shape.d_proj() + c.shape.d_inner()}, act);
}

Benchmark mixer_scan_forward(DType act, const MixerCase& c) {
  return {.op = "mixer_scan",
          .name = c.name,
          .shape = c.dims(),
          .work = {.bytes = tokens_bytes(act, c), .flops = mixer_scan_flops(c.shape, c.B * c.T)},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const MixerScanArgs args{.shape = c.shape,
                                     .params = mixer_params(buffers, c.shape),
                                     .proj = buffers.normal({c.B, c.T, c.shape.d_proj()}, act),
                                     .y = buffers.zeros({c.B, c.T, c.shape.d_inner()}, act),
                                     .cu_seqlens = {},
                                     .state = {}};
            return [args](Context& ctx) { mixer_scan(ctx, args); };
          }};
}

Benchmark mixer_scan_gradient(DType act, const MixerCase& c) {
  return {.op = "mixer_scan_backward",
          .name = c.name,
          .shape = c.dims(),
          .work = {.bytes = tokens_bytes(act, c) + bytes_of({c.B, c.T, c.shape.d_proj()}, act),
                   .flops = 2 * mixer_scan_flops(c.shape, c.B * c.T)},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const MixerScanBackwardArgs args{
                .shape = c.shape,
                .params = mixer_params(buffers, c.shape),
                .proj = buffers.normal({c.B, c.T, c.shape.d_proj()}, act),
                .cu_seqlens = {},
                .initial = {},
                .d_y = buffers.normal({c.B, c.T, c.shape.d_inner()}, act),
                .d_proj = buffers.zeros({c.B, c.T, c.shape.d_proj()}, act),
                .d_params = mixer_params(buffers, c.shape),
                .d_state = {}};
            return [args](Context& ctx) { mixer_scan_backward(ctx, args); };
          }};
}

Benchmark mixer_one_step(DType act, const MixerCase& c) {
  const MixerShape& s = c.shape;
  const double state = bytes_of({c.B, s.H, s.P * s.N + s.R * s.N + s.P + s.S});
  return {.op = "mixer_step",
          .name = c.name,
          .shape = c.dims(),
          .work = {.bytes = tokens_bytes(act, c) + 2 * state,
                   .flops = 4 * product({c.B, s.H, s.R, s.N, s.P})},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const MixerStepArgs args{.shape = c.shape,
                                     .params = mixer_params(buffers, c.shape),
                                     .proj = buffers.normal({c.B, c.shape.d_proj()}, act),
                                     .y = buffers.zeros({c.B, c.shape.d_inner()}, act),
                                     .state = mixer_state(buffers, c.shape, c.B)};
            return [args](Context& ctx) { mixer_step(ctx, args); };
          }};
}

DeltaParams delta_params(Buffers& buffers, const DeltaShape& s) {
  return {.A_log = buffers.normal({s.H}),
          .dt_bias = buffers.normal({s.H}),
          .norm = buffers.normal({s.V})};
}

double tokens_bytes(DType act, const DeltaCase& c) {
  return bytes_of({c.B, c.T, c.shape.d_proj() + c.shape.d_inner()}, act);
}

Benchmark delta_scan_forward(DType act, const DeltaCase& c) {
  return {.op = "delta_scan",
          .name = c.name,
          .shape = c.dims(),
          .work = {.bytes = tokens_bytes(act, c), .flops = delta_scan_flops(c.shape, c.B * c.T)},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const DeltaScanArgs args{.shape = c.shape,
                                     .params = delta_params(buffers, c.shape),
                                     .proj = buffers.normal({c.B, c.T, c.shape.d_proj()}, act),
                                     .y = buffers.zeros({c.B, c.T, c.shape.d_inner()}, act)};
            return [args](Context& ctx) { delta_scan(ctx, args); };
          }};
}

Benchmark delta_scan_gradient(DType act, const DeltaCase& c) {
  return {.op = "delta_scan_backward",
          .name = c.name,
          .shape = c.dims(),
          .work = {.bytes = tokens_bytes(act, c) + bytes_of({c.B, c.T, c.shape.d_proj()}, act),
                   .flops = 2 * delta_scan_flops(c.shape, c.B * c.T)},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const DeltaScanBackwardArgs args{
                .shape = c.shape,
                .params = delta_params(buffers, c.shape),
                .proj = buffers.normal({c.B, c.T, c.shape.d_proj()}, act),
                .d_y = buffers.normal({c.B, c.T, c.shape.d_inner()}, act),
                .d_proj = buffers.zeros({c.B, c.T, c.shape.d_proj()}, act),
                .d_params = delta_params(buffers, c.shape)};
            return [args](Context& ctx) { delta_scan_backward(ctx, args); };
          }};
}

Benchmark delta_one_step(DType act, const DeltaCase& c) {
  const DeltaShape& s = c.shape;
  return {.op = "delta_step",
          .name = c.name,
          .shape = c.dims(),
          .work = {.bytes = tokens_bytes(act, c) + 2 * bytes_of({c.B, s.H, s.V, s.K}),
                   .flops = 6 * product({c.B, s.H, s.V, s.K})},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const DeltaShape& shape = c.shape;
            const DeltaStepArgs args{
                .shape = shape,
                .params = delta_params(buffers, shape),
                .proj = buffers.normal({c.B, shape.d_proj()}, act),
                .y = buffers.zeros({c.B, shape.d_inner()}, act),
                .state = {.delta = buffers.normal({c.B, shape.H, shape.V, shape.K}),
                          .rows = buffers.range(c.B)}};
            return [args](Context& ctx) { delta_step(ctx, args); };
          }};
}

Benchmark swiglu_forward(DType act, const SwigluCase& c) {
  return {.op = "swiglu",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = 3 * bytes_of({c.M, c.F}, act), .flops = 0},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const SwigluArgs args{.y_gate = buffers.normal({c.M, 2 * c.F}, act),
                                  .out = buffers.zeros({c.M, c.F}, act)};
            return [args](Context& ctx) { swiglu(ctx, args); };
          }};
}

Benchmark swiglu_gradient(DType act, const SwigluCase& c) {
  return {.op = "swiglu_backward",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = 5 * bytes_of({c.M, c.F}, act), .flops = 0},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const SwigluBackwardArgs args{.y_gate = buffers.normal({c.M, 2 * c.F}, act),
                                          .d_out = buffers.normal({c.M, c.F}, act),
                                          .d_y_gate = buffers.zeros({c.M, 2 * c.F}, act)};
            return [args](Context& ctx) { swiglu_backward(ctx, args); };
          }};
}

Benchmark linear_swiglu_decode(DType act, const LinearSwigluCase& c) {
  return {.op = "linear_swiglu",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = bytes_of({c.M, c.K}, act) + bytes_of({2 * c.F, c.K}, act) +
                            bytes_of({c.M, c.F}, act),
                   .flops = 4 * product({c.M, c.F, c.K})},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const LinearSwigluArgs args{.x = buffers.normal({c.M, c.K}, act),
                                        .weight = buffers.normal({2 * c.F, c.K}, act),
                                        .y_gate = buffers.zeros({c.M, 2 * c.F}, act),
                                        .out = buffers.zeros({c.M, c.F}, act),
                                        .keeps = false};
            return [args](Context& ctx) { linear_swiglu(ctx, args); };
          }};
}

Benchmark short_conv_forward(DType act, const ShortConvCase& c) {
  const double state = c.state ? 2 * bytes_of({c.B, c.W - 1, c.C}) : 0;
  return {
      .op = c.state ? "short_conv_step" : "short_conv",
      .name = c.name,
      .shape = c.shape(),
      .work = {.bytes = 2 * bytes_of({c.B, c.T, c.X}, act) + state, .flops = 0},
      .prepare = [act, c](Buffers& buffers) -> Call {
        ShortConvArgs args{.first = c.first,
                           .in = buffers.normal({c.B, c.T, c.X}, act),
                           .weight = buffers.normal({c.C, c.W}),
                           .bias = c.bias ? buffers.normal({c.C}) : View{},
                           .out = buffers.zeros({c.B, c.T, c.X}, act)};
        if (c.state) {
          args.state = {.inputs = buffers.zeros({c.B, c.W - 1, c.C}), .rows = buffers.range(c.B)};
        }
        return [args](Context& ctx) { short_conv(ctx, args); };
      }};
}

Benchmark short_conv_gradient(DType act, const ShortConvCase& c) {
  return {.op = "short_conv_backward",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = 2 * bytes_of({c.B, c.T, c.X}, act) + bytes_of({c.B, c.T, c.C}, act),
                   .flops = 0},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const ShortConvBackwardArgs args{.first = c.first,
                                             .in = buffers.normal({c.B, c.T, c.X}, act),
                                             .weight = buffers.normal({c.C, c.W}),
                                             .bias = c.bias ? buffers.normal({c.C}) : View{},
                                             .d_out = buffers.normal({c.B, c.T, c.X}, act),
                                             .d_in = buffers.zeros({c.B, c.T, c.X}, act),
                                             .d_weight = buffers.zeros({c.C, c.W}),
                                             .d_bias = c.bias ? buffers.zeros({c.C}) : View{}};
            return [args](Context& ctx) { short_conv_backward(ctx, args); };
          }};
}

Benchmark rotary_in_place(DType act, const RotaryCase& c) {
  return {.op = "rotary",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = 2 * bytes_of({c.B, c.T, c.heads, c.dims}, act), .flops = 0},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const RotaryArgs args{
                .x = buffers.normal({c.B, c.T, c.heads * c.d}, act), .d = c.d, .dims = c.dims};
            return [args](Context& ctx) { rotary(ctx, args); };
          }};
}

int64_t columns(const AttentionCase& c) {
  return (c.Hq + 2 * c.Hkv) * c.d;
}

// Pairs of a query and a key that it sees. Packed sequences are of equal length here.
double pairs(const AttentionCase& c) {
  const double sequences = static_cast<double>(c.packed > 0 ? c.packed : c.B);
  const double T = static_cast<double>(c.T) / (c.packed > 0 ? sequences : 1);
  return sequences * T * ((T + 1) / 2 + static_cast<double>(c.past));
}

View packed_lengths(Buffers& buffers, const AttentionCase& c) {
  if (c.packed == 0) return {};
  std::vector<int32_t> cu;
  for (int64_t i = 0; i <= c.packed; ++i) cu.push_back(static_cast<int32_t>(i * c.T / c.packed));
  return buffers.values(cu);
}

Benchmark attention_forward(DType act, const AttentionCase& c) {
  return {.op = "attention",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = bytes_of({c.B, c.T, columns(c) + c.Hq * c.d}, act),
                   .flops = 4 * product({c.Hq, c.d}) * pairs(c)},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const AttentionArgs args{.Hq = c.Hq,
                                     .Hkv = c.Hkv,
                                     .d = c.d,
                                     .qkv = buffers.normal({c.B, c.T, columns(c)}, act),
                                     .y = buffers.zeros({c.B, c.T, c.Hq * c.d}, act),
                                     .lse = buffers.zeros({c.B, c.Hq, c.T}),
                                     .cu_seqlens = packed_lengths(buffers, c),
                                     .cache = {}};
            return [args](Context& ctx) { attention(ctx, args); };
          }};
}

Benchmark attention_gradient(DType act, const AttentionCase& c) {
  return {.op = "attention_backward",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = 2 * bytes_of({c.B, c.T, columns(c) + c.Hq * c.d}, act),
                   .flops = 10 * product({c.Hq, c.d}) * pairs(c)},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const AttentionBackwardArgs args{.Hq = c.Hq,
                                             .Hkv = c.Hkv,
                                             .d = c.d,
                                             .qkv = buffers.normal({c.B, c.T, columns(c)}, act),
                                             .y = buffers.normal({c.B, c.T, c.Hq * c.d}, act),
                                             .lse = buffers.normal({c.B, c.Hq, c.T}),
                                             .cu_seqlens = packed_lengths(buffers, c),
                                             .d_y = buffers.normal({c.B, c.T, c.Hq * c.d}, act),
                                             .d_qkv = buffers.zeros({c.B, c.T, columns(c)}, act)};
            return [args](Context& ctx) { attention_backward(ctx, args); };
          }};
}

Benchmark attention_one_step(DType act, const AttentionCase& c) {
  return {.op = "attention_step",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = 2 * bytes_of({c.B, c.past + 1, c.Hkv, c.d}, act),
                   .flops = 4 * product({c.Hq, c.d}) * pairs(c)},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const AttentionCache cache{.k = buffers.normal({c.B, c.past + 1, c.Hkv, c.d}, act),
                                       .v = buffers.normal({c.B, c.past + 1, c.Hkv, c.d}, act),
                                       .rows = buffers.range(c.B),
                                       .lengths = buffers.integers({c.B}, c.past, c.past + 1)};
            const AttentionArgs args{.Hq = c.Hq,
                                     .Hkv = c.Hkv,
                                     .d = c.d,
                                     .qkv = buffers.normal({c.B, c.T, columns(c)}, act),
                                     .y = buffers.zeros({c.B, c.T, c.Hq * c.d}, act),
                                     .lse = {},
                                     .cu_seqlens = {},
                                     .cache = cache};
            return [args](Context& ctx) { attention_step(ctx, args); };
          }};
}

Benchmark cross_entropy_forward(DType act, const CrossEntropyCase& c) {
  const double weight = bytes_of({c.V, c.D}, c.dtype);
  const double gradient = c.gradient ? 2 * bytes_of({c.V, c.D}) + bytes_of({c.M, c.D}, act) : 0;
  return {.op = "cross_entropy",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = weight + bytes_of({c.M, c.D}, act) + gradient,
                   .flops = (c.gradient ? 6 : 2) * product({c.M, c.V - c.padding, c.D})},
          .prepare = [act, c](Buffers& buffers) -> Call {
            const CrossEntropyArgs args{
                .hidden = buffers.normal({c.M, c.D}, act),
                // As it is at first: some rows are those of hidden, and would outweigh all others.
                .weight = buffers.normal({c.V, c.D}, c.dtype, 0.02f),
                .targets = buffers.integers({c.M}, 0, c.V - c.padding),
                .vocab = c.V - c.padding,
                .nll = buffers.zeros({c.M}),
                .lse = buffers.zeros({c.M}),
                .d_hidden = c.gradient ? buffers.zeros({c.M, c.D}, act) : View{},
                .d_weight = c.gradient ? buffers.zeros({c.V, c.D}) : View{}};
            return [args](Context& ctx) { cross_entropy(ctx, args); };
          }};
}

Benchmark adamw_update(DType act, const AdamwCase& c) {
  // Reads all four and writes three; the norm needs the gradients once more.
  const double passes = c.clip > 0 ? 8 : 7;
  const bool low = act != DType::f32;  // writes the rounded parameters too
  return {.op = "adamw",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = passes * bytes_of({c.tensors, c.elements}) +
                            (low ? bytes_of({c.tensors, c.elements}, act) : 0),
                   .flops = 0},
          .prepare = [act, low, c](Buffers& buffers) -> Call {
            std::vector<AdamwTensor> tensors;
            for (int64_t i = 0; i < c.tensors; ++i) {
              tensors.push_back({.param = buffers.normal({c.elements}),
                                 .grad = buffers.normal({c.elements}),
                                 .m = buffers.zeros({c.elements}),
                                 .v = buffers.zeros({c.elements}),
                                 .low = low ? buffers.zeros({c.elements}, act) : View{}});
            }
            const View norm = buffers.zeros({1});
            return [c, tensors, norm](Context& ctx) {
              adamw(ctx, {.tensors = tensors, .lr = 1e-3f, .clip = c.clip, .grad_norm = norm});
            };
          }};
}

Benchmark sample_tokens(DType, const SampleCase& c) {
  return {.op = "sample",
          .name = c.name,
          .shape = c.shape(),
          .work = {.bytes = bytes_of({c.B, c.V}), .flops = 0},
          .prepare = [c](Buffers& buffers) -> Call {
            const SampleArgs args{.logits = buffers.normal({c.B, c.V}),
                                  .vocab = c.V,
                                  .history = buffers.integers({c.B, 64}, 0, c.V),
                                  .out = buffers.zeros({c.B}, DType::i32),
                                  .temperature = c.temperature,
                                  .top_k = c.top_k,
                                  .top_p = c.top_p,
                                  .min_p = c.min_p,
                                  .repeat_penalty = c.repeat_penalty,
                                  .seed = 1,
                                  .position = 0};
            return [args](Context& ctx) { sample(ctx, args); };
          }};
}

}  // namespace

double mixer_scan_flops(const MixerShape& s, int64_t tokens) {
  const int64_t Q = mixer_scan_chunk(s.R) * s.R;
  return product({tokens, s.H, s.R}) *
         (2 * product({Q, s.N}) + 2 * product({Q, s.P}) + 4 * product({s.N, s.P}));
}

double delta_scan_flops(const DeltaShape& s, int64_t tokens) {
  const int64_t Q = delta_scan_chunk(Device::cuda);
  return product({tokens, s.H}) * (2 * product({Q, s.K + s.V}) + 6 * product({s.K, s.V}));
}

std::vector<Benchmark> op_benchmarks(const Placement& placement) {
  std::vector<Benchmark> benchmarks;
  const bool gpu = placement.device == Device::cuda;
  const auto add = [&](auto make, const auto& cases) {
    for (auto c : cases) {
      if constexpr (requires { c.dtype; }) {
        if (gpu && (c.name == "f32" || c.name == "bf16" || c.name == "f16")) continue;
        if (gpu) c.dtype = placement.dtype;
      }
      benchmarks.push_back(make(placement.dtype, c));
      benchmarks.back().dtype = placement.dtype;
    }
  };
  add(embedding_forward, embedding_cases());
  add(embedding_gradient, embedding_cases());
  add(rms_norm_forward, rms_norm_cases());
  add(rms_norm_gradient, rms_norm_cases());
  add(grouped_rms_norm_forward, grouped_rms_norm_cases());
  add(grouped_rms_norm_gradient, grouped_rms_norm_cases());
  add(linear_forward, linear_cases());
  add(linear_gradient, linear_cases());
  add(linear_forward, linear_decode_cases());
  add(mixer_scan_forward, mixer_cases());
  add(mixer_scan_gradient, mixer_cases());
  add(mixer_one_step, mixer_step_cases());
  add(delta_scan_forward, delta_cases());
  add(delta_scan_gradient, delta_cases());
  add(delta_one_step, delta_step_cases());
  add(swiglu_forward, swiglu_cases());
  add(swiglu_gradient, swiglu_cases());
  add(linear_swiglu_decode, linear_swiglu_cases());
  add(short_conv_forward, short_conv_cases());
  add(short_conv_gradient, short_conv_cases());
  add(short_conv_forward, short_conv_step_cases());
  add(rotary_in_place, rotary_cases());
  add(attention_forward, attention_cases());
  add(attention_gradient, attention_cases());
  add(attention_one_step, attention_step_cases());
  add(cross_entropy_forward, cross_entropy_cases());
  add(adamw_update, adamw_cases());
  add(sample_tokens, sample_cases());
  return benchmarks;
}

}  // namespace mamba3::bench
