// Forward and backward of the selective scan for CPUs, built on the user's machine when it is asked
// for by name (see compiled.py).
//
// With z = Delta A, a = exp(z), w = -expm1(z) and u = B x, both discretisations are
//
//   h_t = h_{t-1} + (g u - w h_{t-1}),   g = w / |A| (zero-order hold)  or  g = Delta (Euler),
//
// which leaves the state untouched, to the bit, where Delta = 0. A vector holds neighbouring
// channels, so that the sum over the state needs no shuffling and every channel is computed the same
// way wherever it stands; a clip cut in chunks gives the same bits. Nothing here depends on the
// number of threads.
//
// The backward keeps one state per chunk of frames, recomputes the others, and with the adjoint
// G_t = C_t dy_t + a_{t+1} G_{t+1} has
//
//   dDelta = sum_n G a (A h_{t-1} + u)           (Euler: G (A a h_{t-1} + u))
//   dA     = sum_t G (Delta a h_{t-1} + u m / A^2),  m = w + z a     (Euler: m = 0)
//   dx     = sum_n G g B,   dB = sum_d G g x,   dC = sum_d dy h,   dh_0 = a_1 G_1.
//
// m is z^2/2 for small z, from two numbers of size |z|: there it comes from the polynomial of expm1,
// so that no gradient subtracts nearly equal numbers.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

// 64 bytes: one AVX-512 register. The compiler splits it where registers are narrower.
typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef double Double8 __attribute__((vector_size(64)));
typedef int64_t Int8 __attribute__((vector_size(64)));

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  using V = Float16;
  using I = Int16;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float lowest = -87.0f, magic = 12582912.0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  // (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, highest power first (Cephes).
  static constexpr float q[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

template <>
struct Lanes<double> {
  using V = Double8;
  using I = Int8;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double lowest = -708.0, magic = 6755399441055744.0;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  // 1/14! ... 1/2!: the Taylor series is already exact to the last bit on this interval.
  static constexpr double q[] = {
      1.0 / 87178291200.0, 1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0,
      1.0 / 3628800.0,     1.0 / 362880.0,     1.0 / 40320.0,     1.0 / 5040.0,
      1.0 / 720.0,         1.0 / 120.0,        1.0 / 24.0,        1.0 / 6.0,
      1.0 / 2.0};
};

template <typename T>
constexpr int lanes = 64 / sizeof(T);

template <typename T>
using Vec = typename Lanes<T>::V;

template <typename T>
inline Vec<T> load(const T* from, int count) {
  Vec<T> v;
  if (count == lanes<T>) {
    std::memcpy(&v, from, sizeof(v));
  } else {
    v = Vec<T>{};
    for (int lane = 0; lane < count; ++lane) v[lane] = from[lane];
  }
  return v;
}

template <typename T>
inline void store(T* to, const Vec<T>& v, int count) {
  if (count == lanes<T>) {
    std::memcpy(to, &v, sizeof(v));
  } else {
    for (int lane = 0; lane < count; ++lane) to[lane] = v[lane];
  }
}

template <typename T>
inline T sum(const Vec<T>& v) {
  T total = 0;
  for (int lane = 0; lane < lanes<T>; ++lane) total += v[lane];
  return total;
}

// w = -expm1(z), a = exp(z) and, if asked, m = w + z a, each to the last bits, for z <= 0.
template <typename T, bool with_m>
inline void decay(Vec<T> z, Vec<T>& w, Vec<T>& a, Vec<T>& m) {
  using L = Lanes<T>;
  using V = Vec<T>;
  // Everything forgotten long before; also keeps 2^k a normal number. NaN stays NaN.
  const V clamped = z < L::lowest ? V{} + L::lowest : z;
  const V k = (clamped * T(1.4426950408889634) + L::magic) - L::magic;
  const V r = clamped - k * L::ln2_high - k * L::ln2_low;
  V q = V{} + L::q[0];
  for (unsigned i = 1; i < sizeof(L::q) / sizeof(T); ++i) q = q * r + L::q[i];
  const V p = r + (r * r) * q;
  const auto bits = (__builtin_convertvector(k, typename L::I) + L::bias) << L::mantissa;
  V scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  const V scaled = scale * p;
  w = (T(1) - scale) - scaled;
  a = scale + scaled;
  if (with_m) m = k == T(0) ? (r * r) * (T(1) - q * (T(1) - r)) : w + clamped * a;
}

template <typename T>
struct Sizes {
  int64_t clips, frames, d, n, chunk;
  int64_t blocks() const { return (d + lanes<T> - 1) / lanes<T>; }
  int64_t chunks() const { return (frames + chunk - 1) / chunk; }
};

// The rows of A that belong to a block of channels, one vector per state, and 1 / |A|.
template <typename T>
void load_A(const T* A, int64_t n, int64_t channel, int count, Vec<T>* rate, Vec<T>* inverse) {
  for (int64_t i = 0; i < n; ++i) {
    rate[i] = Vec<T>{} - T(1);
    for (int lane = 0; lane < count; ++lane) rate[i][lane] = A[(channel + lane) * n + i];
    inverse[i] = T(-1) / rate[i];
  }
}

// (d, n) of one clip, to and from one vector per state.
template <typename T>
void load_state(const T* state, int64_t n, int64_t channel, int count, Vec<T>* h) {
  for (int64_t i = 0; i < n; ++i) {
    h[i] = Vec<T>{};
    if (state == nullptr) continue;
    for (int lane = 0; lane < count; ++lane) h[i][lane] = state[(channel + lane) * n + i];
  }
}

template <typename T>
void store_state(T* state, int64_t n, int64_t channel, int count, const Vec<T>* h) {
  for (int64_t i = 0; i < n; ++i)
    for (int lane = 0; lane < count; ++lane) state[(channel + lane) * n + i] = h[i][lane];
}

// kN is the number of states if it is known when this is compiled (they then live in registers).
template <typename T, bool kZoh, int kN>
void forward_block(const Sizes<T>& s, int64_t clip, int64_t block, const T* x, const T* delta,
                   const T* A, const T* B, const T* C, const T* initial, const bool* reset, T* y,
                   T* final_state, T* kept) {
  using V = Vec<T>;
  const int64_t n = kN ? kN : s.n, channel = block * lanes<T>;
  const int count = static_cast<int>(std::min<int64_t>(lanes<T>, s.d - channel));
  std::vector<V> many(kN ? 0 : 3 * n);
  V few[3 * (kN ? kN : 1)];
  V* const h = kN ? few : many.data();
  V* const rate = h + n;
  V* const inverse = rate + n;
  load_A<T>(A, n, channel, count, rate, inverse);
  load_state<T>(initial ? initial + clip * s.d * n : nullptr, n, channel, count, h);
  for (int64_t t = 0; t < s.frames; ++t) {
    const int64_t frame = clip * s.frames + t;
    if (kept != nullptr && t % s.chunk == 0) {
      T* to = kept + (t / s.chunk * s.clips + clip) * n * s.d + channel;
      for (int64_t i = 0; i < n; ++i) store<T>(to + i * s.d, h[i], count);
    }
    if (reset != nullptr && reset[frame])
      for (int64_t i = 0; i < n; ++i) h[i] = V{};
    const V x_t = load<T>(x + frame * s.d + channel, count);
    const V step = load<T>(delta + frame * s.d + channel, count);
    const V input = kZoh ? x_t : x_t * step;
    const T* const B_t = B + frame * n;
    const T* const C_t = C + frame * n;
    V total{};
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; ++i) {
      V w, a, m;
      decay<T, false>(step * rate[i], w, a, m);
      const V u = input * B_t[i];
      h[i] += kZoh ? w * (u * inverse[i] - h[i]) : u - w * h[i];
      total += h[i] * C_t[i];
    }
    store<T>(y + frame * s.d + channel, total, count);
  }
  store_state<T>(final_state + clip * s.d * n, n, channel, count, h);
}

template <typename T>
struct Gradients {
  T *x, *delta, *A, *B, *C, *initial;
};

// Channels whose contributions to dB and dC are summed by one task; fixed, so that the result does
// not depend on the number of threads.
constexpr int64_t kGroup = 64;

template <typename T, bool kZoh, int kN>
void backward_group(const Sizes<T>& s, int64_t clip, int64_t group, const T* grad_y,
                    const T* grad_state, const T* x, const T* delta, const T* A, const T* B,
                    const T* C, const T* kept, const bool* reset, const Gradients<T>& grad) {
  using V = Vec<T>;
  const int64_t n = kN ? kN : s.n, L = lanes<T>;
  const int64_t first = group * (kGroup / L), last = std::min(s.blocks(), first + kGroup / L);
  const int64_t blocks = last - first;
  // Per block: rate, inverse, the adjoint that is carried to earlier chunks, the sum of dA.
  std::vector<V> fixed(blocks * 4 * n);
  // Per frame of a chunk: state before, w, a, m, and the sums of dB and dC over the blocks.
  const int64_t stride = s.chunk * n;
  std::vector<V> work(6 * stride + 2 * n);
  V* const before = work.data();
  V* const ws = before + stride + n;  // one state more: the one after the chunk
  V* const as = ws + stride;
  V* const ms = as + stride;
  V* const sum_B = ms + stride;
  V* const sum_C = sum_B + stride;
  V* const chunk_A = sum_C + stride;

  for (int64_t j = 0; j < blocks; ++j) {
    const int64_t channel = (first + j) * L;
    const int count = static_cast<int>(std::min<int64_t>(L, s.d - channel));
    V* const rate = fixed.data() + j * 4 * n;
    load_A<T>(A, n, channel, count, rate, rate + n);
    load_state<T>(grad_state ? grad_state + clip * s.d * n : nullptr, n, channel, count,
                  rate + 2 * n);
    std::fill(rate + 3 * n, rate + 4 * n, V{});
  }

  for (int64_t chunk = s.chunks() - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * s.chunk, size = std::min(s.chunk, s.frames - start);
    std::fill(sum_B, sum_B + 2 * stride, V{});
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t channel = (first + j) * L;
      const int count = static_cast<int>(std::min<int64_t>(L, s.d - channel));
      const V* const rate = fixed.data() + j * 4 * n;
      const V* const inverse = rate + n;
      V* const carried = fixed.data() + j * 4 * n + 2 * n;
      V* const total_A = carried + n;
      const T* const from = kept + (chunk * s.clips + clip) * n * s.d + channel;
      for (int64_t i = 0; i < n; ++i) before[i] = load<T>(from + i * s.d, count);
      std::fill(chunk_A, chunk_A + n, V{});

      for (int64_t k = 0; k < size; ++k) {
        const int64_t frame = clip * s.frames + start + k;
        const V x_t = load<T>(x + frame * s.d + channel, count);
        const V step = load<T>(delta + frame * s.d + channel, count);
        const V dy = load<T>(grad_y + frame * s.d + channel, count);
        const V input = kZoh ? x_t : x_t * step;
        const T* const B_t = B + frame * n;
        V* const h = before + k * n;
        if (reset != nullptr && reset[frame]) std::fill(h, h + n, V{});
#pragma GCC unroll 4
        for (int64_t i = 0; i < n; ++i) {
          V w, a, m;
          decay<T, kZoh>(step * rate[i], w, a, m);
          const V u = input * B_t[i];
          h[n + i] = h[i] + (kZoh ? w * (u * inverse[i] - h[i]) : u - w * h[i]);
          sum_C[k * n + i] += dy * h[n + i];  // here, because a reset zeroes it in the next frame
          ws[k * n + i] = w;
          as[k * n + i] = a;
          if (kZoh) ms[k * n + i] = m;
        }
      }

      for (int64_t k = size - 1; k >= 0; --k) {
        const int64_t frame = clip * s.frames + start + k;
        const bool dropped = reset != nullptr && reset[frame];
        const V x_t = load<T>(x + frame * s.d + channel, count);
        const V step = load<T>(delta + frame * s.d + channel, count);
        const V dy = load<T>(grad_y + frame * s.d + channel, count);
        const T* const B_t = B + frame * n;
        const T* const C_t = C + frame * n;
        V dx{}, ddelta{};
#pragma GCC unroll 4
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = k * n + i;
          const V w = ws[at], h = before[at];
          const V G = carried[i] + dy * C_t[i];
          const V u = x_t * B_t[i];
          const V Ga = G * as[at];
          const V Gah = Ga * h;
          V Gg;
          if (kZoh) {
            const V Gu = G * u;
            Gg = G * w * inverse[i];
            ddelta += Ga * (rate[i] * h + u);
            chunk_A[i] += step * Gah + Gu * ms[at] * (inverse[i] * inverse[i]);
          } else {
            Gg = G * step;
            ddelta += rate[i] * Gah + G * u;
            chunk_A[i] += step * Gah;
          }
          dx += Gg * B_t[i];
          sum_B[at] += Gg * x_t;
          carried[i] = G - w * G;
        }
        // What entered a frame with a reset was dropped; `before` was zeroed in the loop above.
        if (dropped) std::fill(carried, carried + n, V{});
        store<T>(grad.x + frame * s.d + channel, dx, count);
        store<T>(grad.delta + frame * s.d + channel, ddelta, count);
      }
      // Sums of sums: the rounding of a long clip grows with the number of chunks, not of frames.
      for (int64_t i = 0; i < n; ++i) total_A[i] += chunk_A[i];
    }
    const int64_t at = ((group * s.clips + clip) * s.frames + start) * n;
    for (int64_t i = 0; i < size * n; ++i) {
      grad.B[at + i] = sum<T>(sum_B[i]);
      grad.C[at + i] = sum<T>(sum_C[i]);
    }
  }
  for (int64_t j = 0; j < blocks; ++j) {
    const int64_t channel = (first + j) * L;
    const int count = static_cast<int>(std::min<int64_t>(L, s.d - channel));
    const V* const carried = fixed.data() + j * 4 * n + 2 * n;
    store_state<T>(grad.initial + clip * s.d * n, n, channel, count, carried);
    store_state<T>(grad.A + clip * s.d * n, n, channel, count, carried + n);
  }
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

// Calls `run` with the compile-time choices: discretisation, and the state size that is usual.
template <typename Run>
void with_choices(bool zoh, int64_t n, const Run& run) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (n == 16) {
    if (zoh) run(Yes{}, std::integral_constant<int, 16>{});
    else run(No{}, std::integral_constant<int, 16>{});
  } else {
    if (zoh) run(Yes{}, std::integral_constant<int, 0>{});
    else run(No{}, std::integral_constant<int, 0>{});
  }
}

// Tasks per thread below which waking a second thread costs more than it brings.
int64_t grain(int64_t work_of_a_task) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work_of_a_task));
}

template <typename T>
Sizes<T> sizes_of(const Tensor& x, const Tensor& A, int64_t chunk) {
  return {x.size(0), x.size(1), x.size(2), A.size(1), chunk};
}

// All tensors are contiguous, of one dtype and on the CPU: compiled.py sees to that.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& delta, const Tensor& A,
                                           const Tensor& B, const Tensor& C,
                                           const std::optional<Tensor>& initial_state,
                                           const std::optional<Tensor>& reset, bool zoh,
                                           int64_t chunk, bool keep_states) {
  const auto options = x.options().requires_grad(false);
  const int64_t chunks = keep_states ? (x.size(1) + chunk - 1) / chunk : 0;
  Tensor y = at::empty(x.sizes(), options);
  Tensor state = at::empty({x.size(0), A.size(0), A.size(1)}, options);
  Tensor kept = at::empty({chunks * x.size(0) * A.numel()}, options);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Sizes<T> s = sizes_of<T>(x, A, chunk);
    with_choices(zoh, s.n, [&](auto is_zoh, auto n) {
      const int64_t tasks = s.clips * s.blocks();
      at::parallel_for(0, tasks, grain(s.frames * s.n * lanes<T>), [&](int64_t from, int64_t to) {
        for (int64_t task = from; task < to; ++task)
          forward_block<T, decltype(is_zoh)::value, decltype(n)::value>(
              s, task / s.blocks(), task % s.blocks(), x.const_data_ptr<T>(),
              delta.const_data_ptr<T>(), A.const_data_ptr<T>(), B.const_data_ptr<T>(),
              C.const_data_ptr<T>(), data_or_null<T>(initial_state), data_or_null<bool>(reset),
              y.mutable_data_ptr<T>(), state.mutable_data_ptr<T>(),
              keep_states ? kept.mutable_data_ptr<T>() : nullptr);
      });
    });
  };
  if (x.scalar_type() == at::kFloat) run(float{});
  else run(double{});
  return {y, state, kept};
}

// The gradients of A (one per clip) and of B and C (one per group of channels) are still to be
// summed over their first axis.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const std::optional<Tensor>& grad_state, const Tensor& x,
    const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const Tensor& kept,
    const std::optional<Tensor>& reset, bool zoh, int64_t chunk) {
  const auto options = x.options().requires_grad(false);
  const int64_t groups = (x.size(2) + kGroup - 1) / kGroup;
  Tensor grad_x = at::empty(x.sizes(), options);
  Tensor grad_delta = at::empty(x.sizes(), options);
  Tensor grad_A = at::empty({x.size(0), A.size(0), A.size(1)}, options);
  Tensor grad_B = at::empty({groups, B.size(0), B.size(1), B.size(2)}, options);
  Tensor grad_C = at::empty({groups, B.size(0), B.size(1), B.size(2)}, options);
  Tensor grad_initial = at::empty({x.size(0), A.size(0), A.size(1)}, options);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Sizes<T> s = sizes_of<T>(x, A, chunk);
    const Gradients<T> grad{grad_x.mutable_data_ptr<T>(), grad_delta.mutable_data_ptr<T>(),
                            grad_A.mutable_data_ptr<T>(), grad_B.mutable_data_ptr<T>(),
                            grad_C.mutable_data_ptr<T>(), grad_initial.mutable_data_ptr<T>()};
    with_choices(zoh, s.n, [&](auto is_zoh, auto n) {
      at::parallel_for(0, s.clips * groups, grain(s.frames * s.n * kGroup),
                       [&](int64_t from, int64_t to) {
        for (int64_t task = from; task < to; ++task)
          backward_group<T, decltype(is_zoh)::value, decltype(n)::value>(
              s, task / groups, task % groups, grad_y.const_data_ptr<T>(),
              data_or_null<T>(grad_state), x.const_data_ptr<T>(), delta.const_data_ptr<T>(),
              A.const_data_ptr<T>(), B.const_data_ptr<T>(), C.const_data_ptr<T>(),
              kept.const_data_ptr<T>(), data_or_null<bool>(reset), grad);
      });
    });
  };
  if (x.scalar_type() == at::kFloat) run(float{});
  else run(double{});
  return {grad_x, grad_delta, grad_A, grad_B, grad_C, grad_initial};
}

}  // namespace

TORCH_LIBRARY(mmau_compiled_scan, library) {
  library.def(
      "forward(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? initial_state, "
      "Tensor? reset, bool zoh, int chunk, bool keep_states) -> (Tensor, Tensor, Tensor)",
      &forward);
  library.def(
      "backward(Tensor grad_y, Tensor? grad_state, Tensor x, Tensor delta, Tensor A, Tensor B, "
      "Tensor C, Tensor kept, Tensor? reset, bool zoh, int chunk) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      &backward);
}
