#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"

namespace mamba3 {

Decay parse_decay(std::string_view name) {
  for (const Decay decay : {Decay::cosine, Decay::wsd, Decay::constant}) {
    if (name == name_of(decay)) return decay;
  }
  input_error("unknown learning rate schedule '{}': use cosine, wsd or constant", name);
}

std::string_view name_of(Decay decay) {
  switch (decay) {
    case Decay::cosine:
      return "cosine";
    case Decay::wsd:
      return "wsd";
    case Decay::constant:
      return "constant";
  }
  return "";
}

double Schedule::at(double progress) const {
  progress = std::clamp(progress, 0.0, 1.0);
  if (progress < warmup) return peak * progress / warmup;
  switch (decay) {
    case Decay::cosine: {
      const double part = warmup < 1 ? (progress - warmup) / (1 - warmup) : 1;
      return floor + (peak - floor) * 0.5 * (1 + std::cos(std::numbers::pi * part));
    }
    case Decay::wsd: {
      const double left = tail > 0 ? std::min(1.0, (1 - progress) / tail) : 1;
      return floor + (peak - floor) * left;
    }
    case Decay::constant:
      break;
  }
  return peak;
}

void Schedule::check() const {
  if (!(peak > 0) || !std::isfinite(peak)) {
    input_error("the learning rate must be above 0, got {}", peak);
  }
  if (!(floor >= 0) || floor > peak) {
    input_error("the final learning rate must be between 0 and the peak {}, got {}", peak, floor);
  }
  if (!(warmup >= 0) || warmup > 1 || !(tail >= 0) || tail > 1) {
    input_error("warm-up and decay are parts of the run, from 0 to 1; got {} and {}", warmup, tail);
  }
}

}  // namespace mamba3
