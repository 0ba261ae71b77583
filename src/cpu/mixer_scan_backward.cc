#include <algorithm>

#include "cpu/mixer.h"
#include "ops/mixer_scan.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/mixer_scan_backward.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/mixer_chunk-inl.h"

// The schedule. Nothing was kept by the forward, so a task (a block of heads of one sequence) first
// walks its chunks for the states at their starts, then goes through them in reverse, recomputing
// each chunk and carrying the gradient of the state (and of the angle, a sum over all later
// tokens). Long sequences do this segment by segment, so that a head holds kSegment states and one
// per segment. As in the forward, all heads of the block take a chunk before any takes the next
// one.
//
// Gradients that several heads share (B, C, angle) and those that several sequences share
// (parameters) go to partial sums that are added up in a fixed order: the result is the same for
// any number of threads. Sequences are taken in waves to bound the memory.

#ifndef MAMBA3_CPU_MIXER_SCAN_BACKWARD_CC_
#define MAMBA3_CPU_MIXER_SCAN_BACKWARD_CC_

namespace mamba3::cpu {
namespace {

constexpr int64_t kSegment = 32;       // chunks
constexpr int64_t kTasksPerWave = 16;  // (sequence, block of heads)
constexpr int64_t kTokenRange = 128;   // tokens whose shared gradients one task adds up

// Gradients of the parameters of one head, from one sequence.
struct HeadGradients {
  float *dt_bias, *D, *A_log;       // (1)
  float *B_bias, *C_bias;           // (R, N)
  float *mimo_x, *mimo_z, *mimo_o;  // (R, P)
  float* norm;                      // (P)

  static int64_t floats(const MixerShape& s) { return 3 + 2 * s.R * s.N + 3 * s.R * s.P + s.P; }
  HeadGradients(const MixerShape& s, float* base)
      : dt_bias(base),
        D(base + 1),
        A_log(base + 2),
        B_bias(base + 3),
        C_bias(B_bias + s.R * s.N),
        mimo_x(C_bias + s.R * s.N),
        mimo_z(mimo_x + s.R * s.P),
        mimo_o(mimo_z + s.R * s.P),
        norm(mimo_o + s.R * s.P) {}
};

// Gradients of one token summed over a block of heads: d B (R,G,N), d C (R,G,N) after the norm, and
// d theta (S).
int64_t shared_floats(const MixerShape& s) {
  return 2 * s.R * s.G * s.N + s.S;
}

struct BackwardScratch {
  ChunkScratch chunk;
  Matrix scores, d_weights;               // (M, M)
  Matrix d_q, d_k, product;               // (M, N)
  Matrix d_y, d_v, product_v;             // (M, P)
  Matrix v_t;                             // (P, M)
  Matrix state_t, d_state_t;              // (P, N)
  Matrix d_state;                         // (N, P)
  Matrix d_angle;                         // (1, S) summed over the tokens from here to the end
  Matrix normed, d_z, d_x;                // (1, P)
  Matrix column_sums;                     // (1, M)
  Matrix d_c;                             // (1, Q)
  Matrix d_scale, d_gamma, d_A_dt, d_dt;  // (1, T) whole sequence
  Matrix states, angles;  // (kSegment N, P), (kSegment, S) at the chunks of a segment
  Matrix segment_states, segment_angles;  // (segments N, P), (segments, S)
  int64_t floats, kept_chunks, kept_segments;

  // What a head keeps from chunk to chunk (d_state, d_angle and the last eight) is there for
  // several heads; that of the first is set.
  BackwardScratch(const MixerShape& s, int64_t Q, int64_t T, int64_t heads, float* base = nullptr)
      : chunk(s, Q, 1, base) {
    SmallMatrices layout(base ? base + chunk.floats : nullptr);
    const int64_t M = Q * s.R, chunks = Q ? (T + Q - 1) / Q : 0;
    const int64_t kept = std::min(chunks, kSegment), segments = (chunks + kSegment - 1) / kSegment;
    for (Matrix* matrix : {&scores, &d_weights}) *matrix = layout.take(M, M);
    for (Matrix* matrix : {&d_q, &d_k, &product}) *matrix = layout.take(M, s.N);
    for (Matrix* matrix : {&d_y, &d_v, &product_v}) *matrix = layout.take(M, s.P);
    v_t = layout.take(s.P, M);
    for (Matrix* matrix : {&state_t, &d_state_t}) *matrix = layout.take(s.P, s.N);
    d_state = layout.take(heads * s.N, s.P);
    d_angle = layout.take(heads, s.S);
    for (Matrix* matrix : {&normed, &d_z, &d_x}) *matrix = layout.take(1, s.P);
    column_sums = layout.take(1, M);
    d_c = layout.take(1, Q);
    for (Matrix* matrix : {&d_scale, &d_gamma, &d_A_dt, &d_dt}) *matrix = layout.take(heads, T);
    states = layout.take(heads * kept * s.N, s.P);
    angles = layout.take(heads * kept, s.S);
    segment_states = layout.take(heads * segments * s.N, s.P);
    segment_angles = layout.take(heads * segments, s.S);
    floats = chunk.floats + layout.floats();
    kept_chunks = kept;
    kept_segments = segments;
  }

  BackwardScratch of_head(int64_t i, const MixerShape& s) const {
    BackwardScratch mine = *this;
    mine.d_state.data = d_state.row(i * s.N);
    mine.d_angle.data = d_angle.row(i);
    mine.d_scale.data = d_scale.row(i);
    mine.d_gamma.data = d_gamma.row(i);
    mine.d_A_dt.data = d_A_dt.row(i);
    mine.d_dt.data = d_dt.row(i);
    mine.states.data = states.row(i * kept_chunks * s.N);
    mine.angles.data = angles.row(i * kept_chunks);
    mine.segment_states.data = segment_states.row(i * kept_segments * s.N);
    mine.segment_angles.data = segment_angles.row(i * kept_segments);
    return mine;
  }
};

}  // namespace
}  // namespace mamba3::cpu

#endif  // MAMBA3_CPU_MIXER_SCAN_BACKWARD_CC_

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {

// One head of one sequence.
struct HeadBackward {
  const MixerScanBackwardArgs& args;
  const MixerWeights& w;
  const MixerTokens& terms;
  const MixerSequence& sequence;
  int64_t h;
  const BackwardScratch& m;
  HeadGradients d;
  float* shared;  // (T, shared_floats) of this block of heads, added to

  const MixerShape& s = args.shape;
  Chunk chunk{.s = args.shape,
              .w = w,
              .terms = terms,
              .proj_view = args.proj,
              .sequence = sequence,
              .h = h,
              .m = m.chunk};

  float* d_proj(int64_t t) const { return token_row(args.d_proj, sequence.token + t); }

  void save(Matrix states, Matrix angles, int64_t slot) const {
    copy(s.N * m.chunk.state.stride, m.chunk.state.data, states.row(slot * s.N));
    copy(s.S, m.chunk.angle.data, angles.row(slot));
  }
  void load(Matrix states, Matrix angles, int64_t slot) const {
    copy(s.N * m.chunk.state.stride, states.row(slot * s.N), m.chunk.state.data);
    copy(s.S, angles.row(slot), m.chunk.angle.data);
  }

  // The walk forward. The state before chunk i of a segment is in slot i % kSegment.
  void begin(int64_t) {
    chunk.begin_sequence(args.initial);
    save(m.states, m.angles, 0);
    begin_gradient();
  }
  void load_segment(int64_t segment) {
    load(m.segment_states, m.segment_angles, segment);
    save(m.states, m.angles, 0);
  }
  void save_segment(int64_t segment) {
    load(m.states, m.angles, 0);
    save(m.segment_states, m.segment_angles, segment);
  }
  void walk(int64_t i) {
    load(m.states, m.angles, i % kSegment);
    chunk.prepare(i * m.chunk.Q, false);
    chunk.advance_state();
    save(m.states, m.angles, (i + 1) % kSegment);
  }
  // The walk back.
  void back(int64_t i) {
    load(m.states, m.angles, i % kSegment);
    chunk.prepare(i * m.chunk.Q);
    chunk_backward();
  }
  void end(int64_t) { terms_backward(end_gradient()); }

  // The gradients of the final state that reach every earlier token: of S and of the angle.
  void begin_gradient() {
    for (int64_t n = 0; n < s.N; ++n) zero(m.d_state.stride, m.d_state.row(n));
    zero(s.S, m.d_angle.data);
    if (args.d_state.empty()) return;
    const HeadState d_final = chunk.head_state(args.d_state);
    copy(s.S, d_final.angle, m.d_angle.data);
    transpose(s.P, s.N, {d_final.ssm, s.N}, m.d_state, s.P);
  }

  void chunk_backward() {
    const int64_t Q = chunk.Q, M = chunk.M;
    chunk.scores(m.scores);
    chunk.weights(m.scores, m.chunk.weights);
    chunk.outputs();
    for (int64_t t = 0; t < Q; ++t) gate_backward(t);
    zero(Q, m.d_c.data);
    weights_backward();
    state_backward();

    // A dt of a token takes part in c of every later one.
    float sum = 0;
    for (int64_t t = Q; t-- > 0;) {
      sum += m.d_c.data[t];
      m.d_A_dt.data[chunk.first + t] = sum;
    }
    if (chunk.first + Q == sequence.T && !args.d_state.empty()) {
      for (int64_t r = 0; r < s.R; ++r) {
        add_scaled(s.N, 1, chunk.head_state(args.d_state).k_prev(r), m.d_k.row(M - s.R + r));
      }
    }
    for (int64_t t = Q; t-- > 0;) {
      rotation_backward(t);
      value_backward(t);
    }
  }

  // From d_y of the op to d_y of the rows before norm and gate; z, mimo_z, mimo_o and norm on the
  // way.
  void gate_backward(int64_t t) {
    const int64_t P = s.P;
    const float* z = chunk.proj(t) + s.z() + h * P;
    const float* d_out = token_row(args.d_y, chunk.token(t)) + h * P;
    float* d_z = d_proj(chunk.first + t) + s.z() + h * P;
    zero(P, d_z);
    for (int64_t r = 0; r < s.R; ++r) {
      float* y = m.chunk.y.row(t * s.R + r);
      float* d_y = m.d_y.row(t * s.R + r);
      const float rstd = w.norm ? rstd_of(P, y, s.eps) : 1;
      if (w.norm) scale(P, rstd, y, y);
      const float* norm = w.norm ? w.norm + h * P : nullptr;
      const int64_t row = (h * s.R + r) * P;
      for_vectors(P, [&](auto v, int64_t i) HWY_ATTR {
        const auto one = hn::Set(v, 1.0f);
        const auto normed = hn::LoadU(v, y + i);
        const auto weighted = w.norm ? hn::Mul(normed, hn::LoadU(v, norm + i)) : normed;
        const auto z_i = hn::LoadU(v, z + i), out_i = hn::LoadU(v, d_out + i);
        const auto mimo_z = s.mimo ? hn::LoadU(v, w.mimo_z + row + i) : one;
        const auto mimo_o = s.mimo ? hn::LoadU(v, w.mimo_o + row + i) : one;
        const auto z_r = hn::Mul(z_i, mimo_z);
        const auto sig = sigmoid(v, z_r);
        const auto silu = hn::Mul(z_r, sig);
        const auto d_silu = hn::Mul(sig, hn::MulAdd(z_r, hn::Sub(one, sig), one));
        const auto d_gated = hn::Mul(out_i, mimo_o);
        const auto d_z_r = hn::Mul(hn::Mul(d_gated, weighted), d_silu);
        hn::StoreU(hn::MulAdd(d_z_r, mimo_z, hn::LoadU(v, d_z + i)), v, d_z + i);
        if (s.mimo) {
          float* d_mimo_z = d.mimo_z + r * P + i;
          float* d_mimo_o = d.mimo_o + r * P + i;
          hn::StoreU(hn::MulAdd(d_z_r, z_i, hn::LoadU(v, d_mimo_z)), v, d_mimo_z);
          hn::StoreU(hn::MulAdd(hn::Mul(out_i, weighted), silu, hn::LoadU(v, d_mimo_o)), v,
                     d_mimo_o);
        }
        auto d_normed = hn::Mul(d_gated, silu);
        if (w.norm) {
          float* d_norm = d.norm + i;
          hn::StoreU(hn::MulAdd(d_normed, normed, hn::LoadU(v, d_norm)), v, d_norm);
          d_normed = hn::Mul(d_normed, hn::LoadU(v, norm + i));
        }
        hn::StoreU(d_normed, v, d_y + i);
      });
      if (w.norm) norm_backward(P, y, rstd, d_y, d_y);
    }
  }

  // y_i = exp(c_t) S q_i + sum_j W_ij v_j + D v_i, for everything but q, S and c of the first term.
  void weights_backward() {
    const int64_t M = chunk.M, R = s.R;
    const float D = w.D[h];
    for (int64_t i = 0; i < M; ++i) {
      *d.D += sum_of(s.P, m.d_y.row(i), m.chunk.v.row(i));
      scale(s.P, D, m.d_y.row(i), m.d_v.row(i));
    }
    transpose(M, s.P, m.chunk.v, m.v_t, m.v_t.stride);
    multiply<false, Causal::columns>(M, M, s.P, m.d_y, m.v_t, m.d_weights, false, R);
    multiply<true, Causal::inner_upper>(M, s.P, M, m.chunk.weights, m.d_y, m.d_v, true, R);

    // From d W to the gradient of the scores, in place; column_sums_j is that of scale_s.
    zero(M, m.column_sums.data);
    for (int64_t t = 0; t < chunk.Q; ++t) {
      chunk.decay_row(t);
      const int64_t before = t * R, end = before + R;
      float d_gamma = 0, d_c = 0;
      for (int64_t i = before; i < end; ++i) {
        float* d_weight = m.d_weights.row(i);
        const float* score = m.scores.row(i);
        d_gamma += sum_of(R, d_weight + before, score + before);
        d_c += sum_of(before, d_weight, m.chunk.weights.row(i));
        for_vectors(before, [&](auto v, int64_t j) HWY_ATTR {
          const auto decayed =
              hn::Mul(hn::LoadU(v, d_weight + j), hn::LoadU(v, m.chunk.decay.data + j));
          float* sum = m.column_sums.data + j;
          hn::StoreU(hn::MulAdd(decayed, hn::LoadU(v, score + j), hn::LoadU(v, sum)), v, sum);
          hn::StoreU(hn::Mul(decayed, hn::LoadU(v, m.chunk.scale_columns.data + j)), v,
                     d_weight + j);
        });
        scale(R, m.chunk.gamma.data[t], d_weight + before, d_weight + before);
        zero(M - end, d_weight + end);
      }
      m.d_gamma.data[chunk.first + t] = d_gamma;
      m.d_c.data[t] += d_c;
    }
    for (int64_t t = 0; t < chunk.Q; ++t) {
      float d_scale = 0;
      for (int64_t j = t * R; j < (t + 1) * R; ++j) d_scale += m.column_sums.data[j];
      m.d_scale.data[chunk.first + t] = d_scale;
      m.d_c.data[t] -= d_scale * m.chunk.scale.data[t];
    }
    multiply<false, Causal::inner>(M, s.N, M, m.d_weights, m.chunk.k, m.d_q, false, R);
    multiply<true, Causal::inner_upper>(M, s.N, M, m.d_weights, m.chunk.q, m.d_k, false, R);
  }

  // exp(c_t) S q_i, and the state that the chunk hands on:
  // S' = exp(c_Q) S + sum_j exp(c_Q - c_s) scale_s v_j k_j^T.
  void state_backward() {
    const int64_t M = chunk.M, R = s.R, last = chunk.Q - 1;
    transpose(s.N, s.P, m.chunk.state, m.state_t, s.N);
    transpose(s.N, s.P, m.d_state, m.d_state_t, s.N);
    for (int64_t i = 0; i < M; ++i) {
      scale(s.P, std::exp(m.chunk.c.data[i / R]), m.d_y.row(i), m.d_y.row(i));
    }
    multiply<false>(M, s.N, s.P, m.d_y, m.state_t, m.product, false);
    for (int64_t i = 0; i < M; ++i) {
      m.d_c.data[i / R] += sum_of(s.N, m.product.row(i), m.chunk.q.row(i));
      add_scaled(s.N, 1, m.product.row(i), m.d_q.row(i));
    }
    multiply<false>(M, s.N, s.P, m.chunk.v, m.d_state_t, m.product, false);
    multiply<false>(M, s.P, s.N, m.chunk.k, m.d_state, m.product_v, false);
    for (int64_t j = 0; j < M; ++j) {
      const int64_t t = j / R;
      const float decay = chunk.decay_to_end(t), weight = decay * m.chunk.scale.data[t];
      const float d_weight = sum_of(s.N, m.product.row(j), m.chunk.k.row(j));
      m.d_scale.data[chunk.first + t] += decay * d_weight;
      m.d_c.data[last] += weight * d_weight;
      m.d_c.data[t] -= weight * d_weight;
      add_scaled(s.N, weight, m.product.row(j), m.d_k.row(j));
      add_scaled(s.P, weight, m.product_v.row(j), m.d_v.row(j));
    }
    const float decay = std::exp(m.chunk.c.data[last]);
    for (int64_t n = 0; n < s.N; ++n) {
      m.d_c.data[last] += decay * sum_of(s.P, m.d_state.row(n), m.chunk.state.row(n));
      scale(s.P, decay, m.d_state.row(n), m.d_state.row(n));
    }
    multiply<true>(s.N, s.P, M, m.chunk.q, m.d_y, m.d_state, true);
  }

  // k = rot(B + B_bias, angle), q likewise; the angle is a sum over the tokens up to this one.
  void rotation_backward(int64_t t) {
    const int64_t g = h / (s.H / s.G), RGN = s.R * s.G * s.N;
    const float* cosine = m.chunk.cosine.row(t);
    const float* sine = m.chunk.sine.row(t);
    float* token = shared + (chunk.first + t) * shared_floats(s);
    for (int64_t r = 0; r < s.R; ++r) {
      const int64_t i = t * s.R + r, rg = (r * s.G + g) * s.N;
      channels_backward(m.chunk.k.row(i), cosine, sine, m.d_k.row(i), d.B_bias + r * s.N,
                        token + rg);
      channels_backward(m.chunk.q.row(i), cosine, sine, m.d_q.row(i), d.C_bias + r * s.N,
                        token + RGN + rg);
    }
    const float* theta = terms.theta + chunk.token(t) * s.S;
    add_scaled(s.S, chunk.term(terms.dt, t), m.d_angle.data, token + 2 * RGN);
    m.d_dt.data[chunk.first + t] = s.rope == Rope::data ? sum_of(s.S, theta, m.d_angle.data) : 0.0f;
  }

  void channels_backward(const float* rotated, const float* cosine, const float* sine,
                         float* d_rotated, float* d_bias, float* d_shared) {
    // d rot / d angle of a pair (a, b) is (-b, a).
    for_vectors(s.S, [&](auto v, int64_t i) HWY_ATTR {
      hn::Vec<decltype(v)> a, b, d_a, d_b;
      if (s.rope_pairs == RopePairs::halves) {
        a = hn::LoadU(v, rotated + i), b = hn::LoadU(v, rotated + s.N / 2 + i);
        d_a = hn::LoadU(v, d_rotated + i), d_b = hn::LoadU(v, d_rotated + s.N / 2 + i);
      } else {
        hn::LoadInterleaved2(v, rotated + 2 * i, a, b);
        hn::LoadInterleaved2(v, d_rotated + 2 * i, d_a, d_b);
      }
      const auto d_angle =
          hn::NegMulAdd(d_a, b, hn::MulAdd(d_b, a, hn::LoadU(v, m.d_angle.data + i)));
      hn::StoreU(d_angle, v, m.d_angle.data + i);
    });
    rotate<-1>(s, cosine, sine, d_rotated);
    add_scaled(s.N, 1, d_rotated, d_bias);
    add_scaled(s.N, 1, d_rotated, d_shared);
  }

  // v_r = x * mimo_x.
  void value_backward(int64_t t) {
    const float* x = chunk.proj(t) + s.x() + h * s.P;
    float* d_x = d_proj(chunk.first + t) + s.x() + h * s.P;
    zero(s.P, d_x);
    for (int64_t r = 0; r < s.R; ++r) value_backward(r, x, m.d_v.row(t * s.R + r), d_x);
    if (chunk.first + t + 1 == sequence.T && !args.d_state.empty()) {
      add_scaled(s.P, 1, chunk.head_state(args.d_state).v_prev, d_x);
    }
  }
  void value_backward(int64_t r, const float* x, const float* d_v, float* d_x) {
    if (s.mimo) {
      product<true>(s.P, d_v, x, d.mimo_x + r * s.P);
      product<true>(s.P, d_v, w.mimo_x + (h * s.R + r) * s.P, d_x);
    } else {
      add_scaled(s.P, 1, d_v, d_x);
    }
  }

  // The walk began from S + carry_0 sum_r v_prev_r k_prev_r^T. Returns the gradient of carry_0 and
  // writes that of the initial state.
  float end_gradient() {
    chunk.first = 0;
    float* d_v_prev = m.d_x.data;
    float d_carry = 0;
    zero(s.P, d_v_prev);
    for (int64_t r = 0; r < s.R; ++r) zero(s.N, m.d_k.row(r));
    if (!args.initial.empty()) {
      const HeadState initial = chunk.head_state(args.initial);
      const float carry = chunk.carry(0);
      for (int64_t r = 0; r < s.R; ++r) {
        float* v = m.chunk.v.row(r);
        float* d_v = m.d_v.row(r);
        float* d_k = m.d_k.row(r);
        value(s, w, h, r, initial.v_prev, v);
        zero(s.P, d_v);
        for (int64_t n = 0; n < s.N; ++n) {
          d_k[n] = sum_of(s.P, m.d_state.row(n), v);
          add_scaled(s.P, initial.k_prev(r)[n], m.d_state.row(n), d_v);
        }
        d_carry += sum_of(s.N, d_k, initial.k_prev(r));
        scale(s.N, carry, d_k, d_k);
        scale(s.P, carry, d_v, d_v);
        value_backward(r, initial.v_prev, d_v, d_v_prev);
      }
    }
    if (!args.d_state.empty()) {
      const HeadState d_initial = chunk.head_state(args.d_state);
      for (int64_t r = 0; r < s.R; ++r) copy(s.N, m.d_k.row(r), d_initial.k_prev(r));
      copy(s.P, d_v_prev, d_initial.v_prev);
      copy(s.S, m.d_angle.data, d_initial.angle);
      transpose(s.N, s.P, m.d_state, {d_initial.ssm, s.N}, s.N);
    }
    return d_carry;
  }

  // gamma_t = lam_t dt_t, carry_t = (1 - lam_t) dt_t, scale_t = gamma_t + carry_{t+1}; then to the
  // raw columns dd_dt, dd_A and trap of the projection.
  void terms_backward(float d_carry) {
    chunk.first = 0;
    for (int64_t t = 0; t < sequence.T; ++t) {
      const float* proj = chunk.proj(t);
      float* d_row = d_proj(t);
      const float dt = chunk.term(terms.dt, t), lam = chunk.term(terms.lam, t);
      const float d_gamma = m.d_gamma.data[t] + m.d_scale.data[t];
      const float A = -decay_rate(s, w, proj, h);
      const float d_dt =
          lam * d_gamma + (1 - lam) * d_carry + A * m.d_A_dt.data[t] + m.d_dt.data[t];
      const float d_raw = d_dt / (1 + std::exp(-(proj[s.dd_dt() + h] + w.dt_bias[h])));
      d_row[s.dd_dt() + h] = d_raw;
      *d.dt_bias += d_raw;
      const float d_A = dt * m.d_A_dt.data[t];
      if (s.has_dd_A()) {
        const float slope = decay_act_derivative(s.decay_act, proj[s.dd_A() + h]);
        d_row[s.dd_A() + h] = -A > s.A_floor ? -slope * d_A : 0;
      } else {
        *d.A_log += A * d_A;
      }
      if (s.has_trap()) d_row[s.trap() + h] = dt * (d_gamma - d_carry) * lam * (1 - lam);
      d_carry = m.d_scale.data[t];
    }
  }
};

// Heads [first, last) of one sequence, their gradients in rows of `gradients`.
void heads_backward(const MixerScanBackwardArgs& args, const MixerWeights& w,
                    const MixerTokens& terms, const MixerSequence& sequence, int64_t first,
                    int64_t last, const BackwardScratch& scratch, float* gradients, float* shared) {
  const MixerShape& s = args.shape;
  const auto each_head = [&](auto method, int64_t i) HWY_ATTR {
    for (int64_t h = first; h < last; ++h) {
      const BackwardScratch mine = scratch.of_head(h - first, s);
      HeadBackward head{.args = args,
                        .w = w,
                        .terms = terms,
                        .sequence = sequence,
                        .h = h,
                        .m = mine,
                        .d = HeadGradients(s, gradients + (h - first) * HeadGradients::floats(s)),
                        .shared = shared};
      (head.*method)(i);
    }
  };
  if (sequence.T == 0) return;
  const int64_t chunks = (sequence.T + scratch.chunk.Q - 1) / scratch.chunk.Q;
  const int64_t segments = (chunks + kSegment - 1) / kSegment;
  each_head(&HeadBackward::begin, 0);
  // Only the last segment's states are still there after the walk; the others are walked again.
  for (int64_t i = 0; i < chunks; ++i) {
    if (i % kSegment == 0) each_head(&HeadBackward::save_segment, i / kSegment);
    if (i + 1 < chunks) each_head(&HeadBackward::walk, i);
  }
  for (int64_t segment = segments; segment-- > 0;) {
    const int64_t begin = segment * kSegment, end = HWY_MIN(chunks, begin + kSegment);
    if (segment + 1 < segments) {
      each_head(&HeadBackward::load_segment, segment);
      for (int64_t i = begin; i + 1 < end; ++i) each_head(&HeadBackward::walk, i);
    }
    for (int64_t i = end; i-- > begin;) each_head(&HeadBackward::back, i);
  }
  each_head(&HeadBackward::end, 0);
}

void backward_tokens(const MixerScanBackwardArgs& args, const MixerWeights& w,
                     const MixerTokens& terms, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    token_terms(args.shape, w, token_row(args.proj, token), token, terms);
  }
}

// Gradients shared by the heads: `shared` (blocks, stride) summed over the blocks for one token,
// taken through the norms of B and C and the tanh of the angle. d_norm holds d B_norm (N) and d
// C_norm (N).
void shared_backward(const MixerScanBackwardArgs& args, const MixerWeights& w,
                     const MixerTokens& terms, int64_t token, const float* shared, int64_t blocks,
                     int64_t stride, float* sum, float* d_norm) {
  const MixerShape& s = args.shape;
  const int64_t RG = s.R * s.G;
  zero(shared_floats(s), sum);
  for (int64_t i = 0; i < blocks; ++i) add_scaled(shared_floats(s), 1, shared + i * stride, sum);
  const float* proj = token_row(args.proj, token);
  float* d_proj = token_row(args.d_proj, token);
  for (int64_t i = 0; i < 2 * RG; ++i) {
    const bool is_B = i < RG;
    const float rstd = is_B ? terms.rstd_B[token * RG + i] : terms.rstd_C[token * RG + i - RG];
    const float* weight = is_B ? w.B_norm : w.C_norm;
    const float* raw = proj + s.B() + i * s.N;  // C follows B
    float* d_weight = d_norm + (is_B ? 0 : s.N);
    float* d_raw = d_proj + s.B() + i * s.N;
    float* d_out = sum + i * s.N;
    if (!s.bc_norm) {
      copy(s.N, d_out, d_raw);
      continue;
    }
    scale(s.N, rstd, raw, d_raw);
    product<true>(s.N, d_out, d_raw, d_weight);
    product<false>(s.N, d_out, weight, d_out);
    norm_backward(s.N, d_raw, rstd, d_out, d_raw);
  }
  if (!s.has_angles()) return;
  // theta = pi tanh(angle), so d theta / d angle = pi - theta^2 / pi.
  const float* theta = terms.theta + token * s.S;
  const float* d_theta = sum + 2 * RG * s.N;
  for (int64_t i = 0; i < s.S; ++i) {
    constexpr float pi = std::numbers::pi_v<float>;
    d_proj[s.angle() + i] = d_theta[i] * (pi - theta[i] * theta[i] / pi);
  }
}

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(backward_tokens);
HWY_EXPORT(heads_backward);
HWY_EXPORT(shared_backward);

namespace {

void add(int64_t n, const float* x, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}

// What one head and sequence gave, added to the gradients of the parameters.
void add_gradients(const MixerShape& s, int64_t h, const HeadGradients& d,
                   const MixerParams& total) {
  const auto add_row = [h](int64_t n, const float* x, const View& y) {
    add(n, x, y.as<float>() + h * n);
  };
  add_row(1, d.dt_bias, total.dt_bias);
  add_row(1, d.D, total.D);
  if (!s.has_dd_A()) add_row(1, d.A_log, total.A_log);
  if (s.bc_bias) {
    add_row(s.R * s.N, d.B_bias, total.B_bias);
    add_row(s.R * s.N, d.C_bias, total.C_bias);
  }
  if (s.mimo) {
    add_row(s.R * s.P, d.mimo_x, total.mimo_x);
    add_row(s.R * s.P, d.mimo_z, total.mimo_z);
    add_row(s.R * s.P, d.mimo_o, total.mimo_o);
  }
  if (s.out_norm) add_row(s.P, d.norm, total.norm);
}

}  // namespace

void mixer_scan_backward(Context& ctx, const MixerScanBackwardArgs& args) {
  const MixerShape& s = args.shape;
  const int64_t tokens = args.proj.dim(0) * args.proj.dim(1);
  const MixerWeights weights(args.params);
  const auto sequences = mixer_sequences(args.proj, args.cu_seqlens);
  const int64_t count = static_cast<int64_t>(sequences.size());
  if (count == 0) return;
  int64_t longest = 0;
  for (const MixerSequence& sequence : sequences) longest = std::max(longest, sequence.T);

  ScratchScope scope(ctx.scratch);
  const MixerTokens terms(s, tokens, scope);
  ctx.threads.parallel_for(tokens, 32, [&](int64_t begin, int64_t end, int) {
    HWY_DYNAMIC_DISPATCH(backward_tokens)(args, weights, terms, begin, end);
  });

  const int64_t Q = std::min(args.chunk ? args.chunk : mixer_scan_chunk(s.R), longest);
  const int64_t blocks = std::clamp<int64_t>(kTasksPerWave / count, 1, s.H);
  const int64_t wave = std::min(count, (kTasksPerWave + blocks - 1) / blocks);
  const int64_t block_heads = (s.H + blocks - 1) / blocks,
                block_floats = longest * shared_floats(s);
  const int64_t scratch_floats = BackwardScratch(s, Q, longest, block_heads).floats;
  const auto scratch = scope.take<float>(scratch_floats * ctx.threads.size());
  std::fill(scratch.begin(), scratch.end(), 0.0f);

  const auto shared = scope.take<float>(wave * blocks * block_floats);
  const int64_t head_floats = HeadGradients::floats(s);
  const auto heads = scope.take<float>(wave * s.H * head_floats);
  const int64_t ranges = (longest + kTokenRange - 1) / kTokenRange;
  const auto norms = scope.take<float>(wave * ranges * 2 * s.N);
  const auto sums = scope.take<float>(ctx.threads.size() * shared_floats(s));

  for (int64_t first = 0; first < count; first += wave) {
    const int64_t here = std::min(wave, count - first);
    ctx.threads.parallel_for(here * blocks, 1, [&](int64_t begin, int64_t end, int thread) {
      const BackwardScratch mine(s, Q, longest, block_heads,
                                 scratch.data() + thread * scratch_floats);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task / blocks, block = task % blocks;
        const int64_t from = block * s.H / blocks, to = (block + 1) * s.H / blocks;
        const MixerSequence& sequence = sequences[first + i];
        float* block_shared = shared.data() + task * block_floats;
        float* block_gradients = heads.data() + (i * s.H + from) * head_floats;
        std::fill_n(block_shared, sequence.T * shared_floats(s), 0.0f);
        std::fill_n(block_gradients, (to - from) * head_floats, 0.0f);
        HWY_DYNAMIC_DISPATCH(heads_backward)
        (args, weights, terms, sequence, from, to, mine, block_gradients, block_shared);
      }
    });
    ctx.threads.parallel_for(here * ranges, 1, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task / ranges, from = task % ranges * kTokenRange;
        const MixerSequence& sequence = sequences[first + i];
        float* d_norm = norms.data() + task * 2 * s.N;
        std::fill_n(d_norm, 2 * s.N, 0.0f);
        for (int64_t t = from; t < std::min(sequence.T, from + kTokenRange); ++t) {
          HWY_DYNAMIC_DISPATCH(shared_backward)
          (args, weights, terms, sequence.token + t,
           shared.data() + i * blocks * block_floats + t * shared_floats(s), blocks, block_floats,
           sums.data() + thread * shared_floats(s), d_norm);
        }
      }
    });
    for (int64_t i = 0; i < here; ++i) {
      for (int64_t h = 0; h < s.H; ++h) {
        const HeadGradients head(s, heads.data() + (i * s.H + h) * head_floats);
        add_gradients(s, h, head, args.d_params);
      }
    }
    for (int64_t task = 0; s.bc_norm && task < here * ranges; ++task) {
      add(s.N, norms.data() + task * 2 * s.N, args.d_params.B_norm.as<float>());
      add(s.N, norms.data() + task * 2 * s.N + s.N, args.d_params.C_norm.as<float>());
    }
  }
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
