#include "mamba3/session.h"

#include <algorithm>

#include "infer/session_impl.h"
#include "infer/state_file.h"

namespace mamba3 {

namespace {

View ids_of(std::span<const int32_t> tokens) {
  return view_of(tokens.data(), {1, static_cast<int64_t>(tokens.size())});
}

}  // namespace

void Session::Impl::note(std::span<const int32_t> tokens) {
  logits_current = false;
  recent.insert(recent.end(), tokens.begin(), tokens.end());
  const auto size = static_cast<int64_t>(recent.size());
  if (size > 2 * kRecentTokens) recent.erase(recent.begin(), recent.end() - kRecentTokens);
}

Session::Session(const Model& model, const SessionOptions& options)
    : impl_(std::make_unique<Impl>(model, options)) {}
Session::~Session() = default;
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;

const Model& Session::model() const {
  return impl_->model;
}

int64_t Session::length() const {
  return impl_->engine.length();
}

void Session::append(std::span<const int32_t> tokens) {
  if (tokens.empty()) return;
  impl_->engine.append(ids_of(tokens));
  impl_->note(tokens);
}

std::vector<float> Session::append_with_logits(std::span<const int32_t> tokens) {
  if (tokens.empty()) return {};
  const auto T = static_cast<int64_t>(tokens.size());
  const int64_t V = model().info().vocab_padded, vocab = model().info().vocab;
  std::vector<float> logits(static_cast<size_t>(T * V));
  impl_->engine.append(ids_of(tokens), view_of(logits.data(), {1, T, V}));
  impl_->note(tokens);
  for (int64_t t = 1; t < T; ++t)  // closes the gaps that the padding leaves
    std::copy_n(logits.begin() + t * V, vocab, logits.begin() + t * vocab);
  logits.resize(static_cast<size_t>(T * vocab));
  return logits;
}

std::span<const float> Session::logits() {
  Impl& s = *impl_;
  const int64_t V = model().info().vocab_padded;
  if (!s.logits_current) {
    s.logits.resize(static_cast<size_t>(V));
    s.engine.last_logits(view_of(s.logits.data(), {1, V}));
    s.logits_current = true;
  }
  return {s.logits.data(), static_cast<size_t>(model().info().vocab)};
}

void Session::reset() {
  impl_->engine.reset();
  impl_->recent.clear();
  impl_->logits_current = false;
}

void Session::save(const std::filesystem::path& file) {
  save_state(file, *impl_);
}

void Session::load(const std::filesystem::path& file) {
  load_state(file, *impl_);
}

}  // namespace mamba3
