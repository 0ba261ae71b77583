#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cctype>
#include <csignal>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/nearest.h"
#include "mamba3/error.h"

namespace mamba3::cli {

namespace {

constexpr const char* kDescription =
    "Mamba-3 language models: train, generate, load published checkpoints.";
constexpr const char* kFooter =
    "Results go to stdout, progress and messages to stderr. Exit codes: 0 success, 1 the work "
    "failed, 2 bad input.\n`mamba3 COMMAND --help` lists the flags of a command.";

int report(ExitCode code, std::string_view message) {
  std::cout.flush();
  std::fflush(stdout);
  fmt::print(stderr, "mamba3: {}\n", message);
  return code;
}

// The command that the command line got to: the program itself, `mamba3 train`, `mamba3 bench
// model`.
const CLI::App& innermost(const CLI::App& app) {
  const CLI::App* command = &app;
  for (auto chosen = command->get_subcommands(); !chosen.empty();
       chosen = command->get_subcommands()) {
    command = chosen.back();
  }
  return *command;
}

std::string full_name(const CLI::App& command) {
  const CLI::App* parent = command.get_parent();
  return parent ? full_name(*parent) + " " + command.get_name() : command.get_name();
}

std::vector<std::string> flags_of(const CLI::App& command) {
  std::vector<std::string> flags;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
    for (const std::string& name : option->get_snames()) flags.push_back("-" + name);
  }
  return flags;
}

std::vector<std::string> commands_of(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::App* sub : command.get_subcommands({})) names.push_back(sub->get_name());
  return names;
}

bool is_flag(const std::string& argument) {
  return argument.size() > 1 && argument[0] == '-';
}

std::string did_you_mean(const std::string& word, const std::vector<std::string>& candidates) {
  const std::string guess = nearest(word, candidates);
  return guess.empty() ? "" : fmt::format(", did you mean {}?", guess);
}

std::string unknown_flag(const CLI::App& command, const std::string& argument) {
  const std::string flag = argument.substr(0, argument.find('='));
  // A single letter is near to every other.
  const bool is_word = flag.size() > 2;
  return fmt::format("unknown flag {}{}", flag,
                     is_word ? did_you_mean(flag, flags_of(command)) : "");
}

// What is wrong with the command line. A misspelt command or flag comes first: it is the cause of
// most other complaints, such as a missing required flag.
std::string explain(const CLI::App& command, const CLI::ParseError& error) {
  const std::vector<std::string> extras = command.remaining(true);
  const std::vector<std::string> commands = commands_of(command);
  if (!extras.empty() && !is_flag(extras.front()) && !commands.empty()) {
    return fmt::format("unknown command '{}'{}", extras.front(),
                       did_you_mean(extras.front(), commands));
  }
  for (const std::string& argument : extras) {
    if (is_flag(argument)) return unknown_flag(command, argument);
  }
  if (!extras.empty()) return fmt::format("unexpected argument '{}'", extras.front());
  std::string message = error.what();
  if (!message.empty()) message[0] = static_cast<char>(std::tolower(message[0]));
  return message;
}

int run(int argc, char** argv) {
  CLI::App app(kDescription, "mamba3");
  app.set_help_flag("-h,--help", "Print this help and exit");
  app.set_version_flag("--version", "mamba3 " MAMBA3_VERSION, "Print the version and exit");
  app.footer(kFooter);
  for (const AddCommand add : kCommands) add(app);
  app.require_subcommand(0, 1);
  try {
    app.parse(argc, argv);  // runs the command's callback
  } catch (const CLI::Success& request) {
    return app.exit(request);  // --help, --version
  } catch (const CLI::ParseError& error) {
    const CLI::App& command = innermost(app);
    return report(kBadInput,
                  fmt::format("{} (see {} --help)", explain(command, error), full_name(command)));
  }
  if (app.get_subcommands().empty()) return report(kBadInput, "no command (see mamba3 --help)");
  return kSuccess;
}

// Results that did not reach their file or pipe must not look like success.
int flush_results(int code) {
  std::cout.flush();
  if (std::fflush(stdout) != 0 || std::ferror(stdout) || !std::cout) {
    return report(kFailure, "cannot write to standard output");
  }
  return code;
}

}  // namespace

}  // namespace mamba3::cli

int main(int argc, char** argv) {
  using namespace mamba3;
  using namespace mamba3::cli;
  // A reader that closes the pipe (`mamba3 generate | head`) ends the program quietly, as it does
  // any filter, even if the parent process ignores the signal.
  std::signal(SIGPIPE, SIG_DFL);
  try {
    return flush_results(cli::run(argc, argv));
  } catch (const InputError& error) {
    return report(kBadInput, error.what());
  } catch (const std::bad_alloc&) {
    return report(kFailure, "out of memory");
  } catch (const std::exception& error) {
    return report(kFailure, error.what());
  }
}
