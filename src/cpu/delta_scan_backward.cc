#include <algorithm>

#include "ops/delta_scan.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/delta_scan_backward.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/delta_chunk-inl.h"

// The schedule: a task is a head of a sequence. It walks the chunks forward and keeps the state
// before each, then takes them in reverse with Z, the gradient of the state after the chunk. With
// the names of cpu/delta_chunk-inl.h and d_r the gradient of v - ks + a u times beta, d_v = beta
// d_r:
//   d_u = exp(c_Q - c_i) Z k_i + p^T d_o,      d_r = d_u + a^T d_v
//   d_q = exp(c_i) S^T d_o_i + (d_o u^T * decay) k
//   d_k = exp(c_Q - c_i) Z^T u_i - exp(c_i) S^T d_v_i + (d_o u^T * decay)^T q + (X + X^T) k,
//     X = -beta d_r u^T * decay, strictly lower
//   d_beta_i = d_r_i . (v_i - ks_i) + sum_{j<i} (d_r_i . u_j) a_ij
//   Z = exp(c_Q) Z + sum_i exp(c_i) (d_o_i q_i^T - d_v_i k_i^T)
// The gradient of c_i has what every product with exp(c_i) in it gives: each is taken by itself, as
// long sums of which one is subtracted from the other would leave noise where decays are strong.

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {

struct DeltaHeadBackward {
  const DeltaScanBackwardArgs& args;
  const DeltaShape& s;
  const DeltaWeights& w;
  const DeltaBackwardScratch& m;
  const DeltaTaskGradients& d;
  DeltaChunk chunk;

  float* d_proj(int64_t t) const { return token_row(args.d_proj, chunk.token(t)); }

  void keep_state(int64_t i) const {
    copy(s.K * m.states.stride, chunk.m.state.data, m.states.row(i * s.K));
  }
  void recall_state(int64_t i) const {
    copy(s.K * m.states.stride, m.states.row(i * s.K), chunk.m.state.data);
  }

  // From d_y of token t and o, to d_z, d_norm and d_o.
  void gate_backward(int64_t t) {
    const float* z = chunk.proj(t) + s.z() + chunk.h * s.V;
    const float* d_y = token_row(args.d_y, chunk.token(t)) + chunk.h * s.V;
    float* d_z = d_proj(t) + s.z() + chunk.h * s.V;
    const float* o = chunk.m.o.row(t);
    float *normed = m.normed.data, *d_normed = m.d_normed.data;
    const float rstd = rstd_of(s.V, o, s.eps);
    scale(s.V, rstd, o, normed);
    for_vectors(s.V, [&](auto v, int64_t i) HWY_ATTR {
      const auto one = hn::Set(v, 1.0f);
      const auto gate = hn::LoadU(v, z + i), d_out = hn::LoadU(v, d_y + i);
      const auto n = hn::LoadU(v, normed + i), weight = hn::LoadU(v, w.norm + i);
      const auto sig = sigmoid(v, gate);
      const auto d_weighted = hn::Mul(d_out, hn::Mul(gate, sig));
      const auto slope = hn::Mul(sig, hn::MulAdd(gate, hn::Sub(one, sig), one));
      hn::StoreU(hn::Mul(hn::Mul(d_out, slope), hn::Mul(n, weight)), v, d_z + i);
      hn::StoreU(hn::Mul(d_weighted, weight), v, d_normed + i);
      hn::StoreU(hn::MulAdd(d_weighted, n, hn::LoadU(v, d.norm + i)), v, d.norm + i);
    });
    norm_backward(s.V, normed, rstd, d_normed, m.d_o.row(t));
  }

  // u = ... + a u times beta, transposed: from d_u in d_r to d_r and d_v, from the last row up.
  void solve_back() {
    const int64_t Q = chunk.Q;
    constexpr int64_t kRows = DeltaChunk::kSolveRows;
    for (int64_t begin = (Q - 1) / kRows * kRows; begin >= 0; begin -= kRows) {
      const int64_t end = HWY_MIN(Q, begin + kRows);
      multiply<true>(end - begin, s.V, Q - end, {chunk.m.a.row(end) + begin, chunk.m.a.stride},
                     {m.d_v.row(end), m.d_v.stride}, {m.d_r.row(begin), m.d_r.stride}, true);
      for (int64_t i = end; i-- > begin;) {
        for (int64_t j = i + 1; j < end; ++j) {
          add_scaled(s.V, chunk.m.a.row(j)[i], m.d_v.row(j), m.d_r.row(i));
        }
        scale(s.V, chunk.m.beta.data[i], m.d_r.row(i), m.d_v.row(i));
      }
    }
  }

  // d_p and d_a (here d_r u^T) become the gradients of q k^T and k k^T; what they give to those of
  // c and beta.
  void weights_backward() {
    const hn::ScalableTag<float> v;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(v));
    float* sums = m.sums.data;  // over the rows
    zero(m.sums.stride, sums);
    for (int64_t t = 0; t < chunk.Q; ++t) {
      float *d_p = m.d_p.row(t), *d_a = m.d_a.row(t);
      const float *p = chunk.m.p.row(t), *a = chunk.m.a.row(t);
      const auto beta = hn::Set(v, chunk.m.beta.data[t]);
      auto d_c = hn::Zero(v), d_beta = hn::Zero(v);
      for (int64_t j = 0; j < t; j += lanes) {
        const auto earlier = hn::FirstN(v, static_cast<size_t>(t - j));
        const auto with_a = hn::Mul(hn::Load(v, d_a + j), hn::Load(v, a + j));
        const auto with_p = hn::Mul(hn::Load(v, d_p + j), hn::Load(v, p + j));
        const auto both = hn::IfThenElseZero(earlier, hn::MulAdd(beta, with_a, with_p));
        d_beta = hn::Add(d_beta, hn::IfThenElseZero(earlier, with_a));
        d_c = hn::Add(d_c, both);
        hn::Store(hn::Add(hn::Load(v, sums + j), both), v, sums + j);
      }
      m.d_c.data[t] += hn::GetLane(hn::SumOfLanes(v, d_c));
      m.d_beta.data[t] = hn::GetLane(hn::SumOfLanes(v, d_beta));
      chunk.decay_row(t);
      chunk.decay_and_mask(d_p, t + 1, 1);
      chunk.decay_and_mask(d_a, t, -chunk.m.beta.data[t]);
    }
    add_scaled(chunk.Q, -1, sums, m.d_c.data);
  }

  // From d_unit (K) of factor x / |x| to d_x, with x / |x| = unit / factor.
  void unit_backward(const float* unit, float factor, float rstd, const float* d_unit, float* d_x) {
    const float along = sum_of(s.K, unit, d_unit) / (factor * factor);
    scale(s.K, factor * rstd, d_unit, d_x);
    add_scaled(s.K, -factor * rstd * along, unit, d_x);
  }

  // Chunk i, the state before it being kept: from Z after it to Z before it.
  void back(int64_t i) {
    const DeltaScratch& f = chunk.m;
    chunk.prepare(i * f.Q, true);
    recall_state(i);
    chunk.weights(true);
    chunk.updates();
    const int64_t Q = chunk.Q, K = s.K, V = s.V;
    const float *from_start = f.from_start.data, *to_end = f.to_end.data;
    float* d_c = m.d_c.data;

    chunk.of_state(f.q, m.os);
    copy(Q * f.o.stride, m.os.data, f.o.data);
    multiply<false, Causal::inner>(Q, V, Q, f.p, f.u, f.o, true);
    multiply<false>(Q, V, K, f.k, m.Z, m.kz, false);
    float d_c_end = 0;
    for (int64_t t = 0; t < Q; ++t) {
      gate_backward(t);
      scale(V, to_end[t], m.kz.row(t), m.kz.row(t));
      const float at_end = sum_of(V, f.u.row(t), m.kz.row(t));
      d_c[t] = sum_of(V, m.d_o.row(t), m.os.row(t)) - at_end;
      d_c_end += at_end;
    }
    copy(Q * m.d_r.stride, m.kz.data, m.d_r.data);
    multiply<true, Causal::inner_upper>(Q, V, Q, f.p, m.d_o, m.d_r, true);
    solve_back();

    transpose(Q, V, f.u, m.u_t, m.u_t.stride);
    multiply<false, Causal::columns>(Q, Q, V, m.d_o, m.u_t, m.d_p, false);
    multiply<false, Causal::columns>(Q, Q, V, m.d_r, m.u_t, m.d_a, false);
    weights_backward();
    for (int64_t t = 0; t < Q; ++t) {
      d_c[t] -= sum_of(V, m.d_v.row(t), f.ks.row(t));
      m.d_beta.data[t] +=
          sum_of(V, m.d_r.row(t), f.v.row(t)) - sum_of(V, m.d_r.row(t), f.ks.row(t));
      copy(V, m.d_v.row(t), d_proj(t) + s.v() + chunk.h * V);
      scale(V, from_start[t], m.d_o.row(t), m.d_o.row(t));
      scale(V, -from_start[t], m.d_v.row(t), m.d_r.row(t));
    }

    // From here on d_o is exp(c_i) d_o_i, and d_r is -exp(c_i) d_v_i.
    transpose(K, V, f.state, m.state_t, K);
    transpose(K, V, m.Z, m.Z_t, K);
    multiply<false>(Q, K, V, m.d_o, m.state_t, m.d_q, false);
    multiply<false, Causal::inner>(Q, K, Q, m.d_p, f.k, m.d_q, true);
    multiply<false>(Q, K, V, f.u, m.Z_t, m.d_k, false);
    for (int64_t t = 0; t < Q; ++t) scale(K, to_end[t], m.d_k.row(t), m.d_k.row(t));
    multiply<false>(Q, K, V, m.d_r, m.state_t, m.d_k, true);
    multiply<true, Causal::inner_upper>(Q, K, Q, m.d_p, f.q, m.d_k, true);
    multiply<false, Causal::inner>(Q, K, Q, m.d_a, f.k, m.d_k, true);
    multiply<true, Causal::inner_upper>(Q, K, Q, m.d_a, f.k, m.d_k, true);

    const float decay = from_start[Q - 1];
    for (int64_t j = 0; j < K; ++j) {
      d_c_end += decay * sum_of(V, m.Z.row(j), f.state.row(j));
      scale(V, decay, m.Z.row(j), m.Z.row(j));
    }
    d_c[Q - 1] += d_c_end;
    multiply<true>(K, V, Q, f.q, m.d_o, m.Z, true);
    multiply<true>(K, V, Q, f.k, m.d_r, m.Z, true);
    tokens_backward();
  }

  // What is one token's: q and k before they were normed, b and a.
  void tokens_backward() {
    const DeltaScratch& f = chunk.m;
    const int64_t h = chunk.h;
    float d_log_alpha = 0;
    for (int64_t t = chunk.Q; t-- > 0;) {
      const float* proj = chunk.proj(t);
      float* d_row = d_proj(t);
      unit_backward(f.q.row(t), chunk.query_scale(), f.rstd_q.data[t], m.d_q.row(t),
                    d_row + s.q() + h * s.K);
      unit_backward(f.k.row(t), 1, f.rstd_k.data[t], m.d_k.row(t), d_row + s.k() + h * s.K);
      d_row[s.b() + h] = m.d_beta.data[t] * f.beta.data[t] / (1 + std::exp(proj[s.b() + h]));
      // c of this token and of the later ones contain its log alpha.
      d_log_alpha += m.d_c.data[t];
      const float slope = 1 / (1 + std::exp(-(proj[s.a() + h] + w.dt_bias[h])));
      const float d_a = -d_log_alpha * std::exp(w.A_log[h]) * slope;
      d_row[s.a() + h] = d_a;
      *d.dt_bias += d_a;
      *d.A_log += d_log_alpha * f.g.data[t];
    }
  }
};

void delta_backward_head(const DeltaScanBackwardArgs& args, const DeltaWeights& w,
                         const MixerSequence& sequence, int64_t h, const DeltaBackwardScratch& m,
                         const DeltaTaskGradients& d) {
  if (sequence.T == 0) return;
  const DeltaShape& s = args.shape;
  DeltaHeadBackward head{
      .args = args,
      .s = s,
      .w = w,
      .m = m,
      .d = d,
      .chunk = {
          .s = s, .w = w, .proj_view = args.proj, .sequence = sequence, .h = h, .m = m.chunk}};
  const int64_t Q = m.chunk.Q, chunks = (sequence.T + Q - 1) / Q;
  head.chunk.begin_sequence({});
  for (int64_t i = 0; i < chunks; ++i) {
    head.keep_state(i);
    if (i + 1 == chunks) break;
    head.chunk.prepare(i * Q, false);
    head.chunk.weights(false);
    head.chunk.updates();
    head.chunk.advance_state();
  }
  zero(s.K * m.Z.stride, m.Z.data);
  for (int64_t i = chunks; i-- > 0;) head.back(i);
}

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(delta_backward_head);

void delta_scan_backward(Context& ctx, const DeltaScanBackwardArgs& args) {
  const DeltaShape& s = args.shape;
  const DeltaWeights weights(args.params), totals(args.d_params);
  const auto sequences = mixer_sequences(args.proj, args.cu_seqlens);
  int64_t longest = 1;
  for (const MixerSequence& sequence : sequences) longest = std::max(longest, sequence.T);
  const int64_t chunk = args.chunk ? args.chunk : delta_scan_chunk(Device::cpu);
  const int64_t Q = std::clamp<int64_t>(chunk, 1, longest), chunks = (longest + Q - 1) / Q;

  ScratchScope scope(ctx.scratch);
  const DeltaBackwardScratch layout(s, Q, chunks, nullptr);
  float* scratch = scope.take<float>(layout.floats * ctx.threads.size()).data();
  const int64_t tasks = static_cast<int64_t>(sequences.size()) * s.H;
  const int64_t task_floats = DeltaTaskGradients::floats(s);
  const auto gradients = scope.take<float>(tasks * task_floats);
  std::fill(gradients.begin(), gradients.end(), 0.0f);
  for (int thread = 0; thread < ctx.threads.size(); ++thread) {
    std::fill_n(scratch + thread * layout.floats, layout.cleared, 0.0f);
  }
  ctx.threads.parallel_for(tasks, 1, [&](int64_t begin, int64_t end, int thread) {
    const DeltaBackwardScratch mine(s, Q, chunks, scratch + thread * layout.floats);
    for (int64_t task = begin; task < end; ++task) {
      HWY_DYNAMIC_DISPATCH(delta_backward_head)
      (args, weights, sequences[static_cast<size_t>(task / s.H)], task % s.H, mine,
       DeltaTaskGradients(gradients.data() + task * task_floats));
    }
  });
  for (int64_t task = 0; task < tasks; ++task) {
    const DeltaTaskGradients mine(gradients.data() + task * task_floats);
    totals.A_log[task % s.H] += *mine.A_log;
    totals.dt_bias[task % s.H] += *mine.dt_bias;
    for (int64_t i = 0; i < s.V; ++i) totals.norm[i] += mine.norm[i];
  }
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
