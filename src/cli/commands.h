#pragma once

#include <initializer_list>

namespace CLI {
class App;
}

namespace mamba3::cli {

// The commands of the program. Each is a file src/cli/NAME.cc with one public function, which adds
// a subcommand with its flags to `app` and sets its callback; the callback does the work. Bad input
// is thrown as InputError, a failure as Error: main() turns them into the message and the exit
// code. A new command is declared here and listed in kCommands.

using AddCommand = void (*)(CLI::App& app);

void add_bench(CLI::App& app);
void add_detokenize(CLI::App& app);
void add_eval(CLI::App& app);
void add_generate(CLI::App& app);
void add_info(CLI::App& app);
void add_logits(CLI::App& app);
void add_perplexity(CLI::App& app);
void add_study(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_train(CLI::App& app);

// In the order in which --help lists them.
inline constexpr std::initializer_list<AddCommand> kCommands = {
    add_info,        //
    add_generate,    //
    add_train,       //
    add_perplexity,  //
    add_eval,        //
    add_study,       //
    add_logits,      //
    add_tokenize,    //
    add_detokenize,  //
    add_bench,       //
};

}  // namespace mamba3::cli
