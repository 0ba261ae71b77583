// Loads a model folder and continues a prompt: the whole public API in a page.
//
//   generate MODEL_FOLDER PROMPT [TOKENS]

#include <cstdio>
#include <cstdlib>

#include "mamba3/mamba3.h"

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s MODEL_FOLDER PROMPT [TOKENS]\n", argv[0]);
    return 2;
  }
  try {
    // The weights, mapped from the file, and the tokenizer. A model never changes: sessions in
    // several threads may share it.
    const mamba3::Model model = mamba3::Model::load(argv[1]);
    const mamba3::ModelInfo& info = model.info();
    std::fprintf(stderr, "%lld layers, %lld parameters, %lld bytes of state\n",
                 static_cast<long long>(info.layers), static_cast<long long>(info.parameters),
                 static_cast<long long>(info.state_bytes));

    // A session is one sequence: what it has read so far is in its state, whose size is fixed.
    mamba3::Session session(model);

    mamba3::GenerateOptions options;
    options.max_tokens = argc > 3 ? std::atoll(argv[3]) : 64;
    options.sampling = {.temperature = 0.8f, .top_k = 40, .seed = 1};

    // The callback sees every token as it is drawn; returning false would end the text.
    const mamba3::Generation result =
        mamba3::generate(session, argv[2], options, [](const mamba3::GeneratedToken& token) {
          std::fwrite(token.text.data(), 1, token.text.size(), stdout);
          std::fflush(stdout);
          return true;
        });
    std::printf("\n");
    std::fprintf(stderr, "%zu tokens, ended by %s\n", result.tokens.size(),
                 std::string(mamba3::name_of(result.finish_reason)).c_str());

    // The session has read the prompt and the text, so it can be continued, asked for the logits
    // of the next token, or saved with session.save("state.safetensors") and loaded another day.
    const auto logits = session.logits();
    std::fprintf(stderr, "%zu logits for the next token\n", logits.size());
  } catch (const mamba3::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
