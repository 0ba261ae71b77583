#include "formats/torch_pickle.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>
#include <variant>

#include "core/error.h"
#include "formats/bytes.h"
#include "formats/tensor_file.h"

namespace mamba3 {

namespace {

// Far above any model's, and bounds what a hostile pickle can make us allocate.
constexpr size_t kMaxValues = 1 << 20;

// The opcodes of a state dict; Python's pickletools documents them.
enum Opcode : uint8_t {
  kProto = 0x80,
  kFrame = 0x95,
  kStop = '.',
  kMark = '(',
  kNone = 'N',
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kLong1 = 0x8a,
  kShortBinUnicode = 0x8c,
  kBinUnicode = 'X',
  kBinUnicode8 = 0x8d,
  kEmptyTuple = ')',
  kTuple = 't',
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kEmptyList = ']',
  kAppend = 'a',
  kAppends = 'e',
  kEmptyDict = '}',
  kSetItem = 's',
  kSetItems = 'u',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kMemoize = 0x94,
  kBinGet = 'h',
  kLongBinGet = 'j',
  kGlobal = 'c',
  kStackGlobal = 0x93,
  kBinPersId = 'Q',
  kReduce = 'R',
  kBuild = 'b',
};

// The other opcodes, for messages.
constexpr std::array<std::pair<uint8_t, std::string_view>, 33> kForeignOpcodes{{
    {'0', "POP"},
    {'1', "POP_MARK"},
    {'2', "DUP"},
    {'F', "FLOAT"},
    {'G', "BINFLOAT"},
    {'I', "INT"},
    {'L', "LONG"},
    {'P', "PERSID"},
    {'S', "STRING"},
    {'T', "BINSTRING"},
    {'U', "SHORT_BINSTRING"},
    {'V', "UNICODE"},
    {'B', "BINBYTES"},
    {'C', "SHORT_BINBYTES"},
    {'d', "DICT"},
    {'g', "GET"},
    {'i', "INST"},
    {'l', "LIST"},
    {'o', "OBJ"},
    {'p', "PUT"},
    {0x81, "NEWOBJ"},
    {0x82, "EXT1"},
    {0x83, "EXT2"},
    {0x84, "EXT4"},
    {0x8b, "LONG4"},
    {0x8e, "BINBYTES8"},
    {0x8f, "EMPTY_SET"},
    {0x90, "ADDITEMS"},
    {0x91, "FROZENSET"},
    {0x92, "NEWOBJ_EX"},
    {0x96, "BYTEARRAY8"},
    {0x97, "NEXT_BUFFER"},
    {0x98, "READONLY_BUFFER"},
}};

std::string_view name_of_foreign(uint8_t opcode) {
  for (const auto& [code, name] : kForeignOpcodes) {
    if (code == opcode) return name;
  }
  return "unknown to pickle";
}

// Values refer to each other by position, so cycles and deep nesting cost nothing.
using Id = uint32_t;
struct None {};
struct Tuple {
  std::vector<Id> items;
};
struct List {
  std::vector<Id> items;
};
struct Dict {
  std::vector<std::pair<Id, Id>> items;
};
struct StorageType {
  DType dtype;
};
struct Storage {
  DType dtype;
  std::string key;
  int64_t size;
};
enum class Callable : uint8_t { ordered_dict, rebuild_tensor, rebuild_parameter };
using Value = std::variant<None, bool, int64_t, std::string, Tuple, List, Dict, StorageType,
                           Storage, Callable, TorchTensor>;

std::optional<Value> global_named(std::string_view module, std::string_view name) {
  static const std::vector<std::tuple<std::string_view, std::string_view, Value>> kGlobals = {
      {"collections", "OrderedDict", Callable::ordered_dict},
      {"torch._utils", "_rebuild_tensor_v2", Callable::rebuild_tensor},
      {"torch._utils", "_rebuild_parameter", Callable::rebuild_parameter},
      {"torch", "FloatStorage", StorageType{DType::f32}},
      {"torch", "BFloat16Storage", StorageType{DType::bf16}},
      {"torch", "HalfStorage", StorageType{DType::f16}},
      {"torch", "DoubleStorage", StorageType{DType::f64}},
      {"torch", "IntStorage", StorageType{DType::i32}},
      {"torch", "LongStorage", StorageType{DType::i64}},
      {"torch", "ByteStorage", StorageType{DType::u8}},
  };
  for (const auto& [known_module, known_name, value] : kGlobals) {
    if (module == known_module && name == known_name) return value;
  }
  return std::nullopt;
}

// The tensor lies within its storage and does not repeat elements.
bool fits_storage(const TorchTensor& t) {
  if (t.dims.size() != t.strides.size() || t.dims.size() > kMaxRank) return false;
  if (t.offset < 0 || t.offset > t.storage_size) return false;
  const std::array<int64_t, 1> storage_dims{t.storage_size};
  const std::optional<int64_t> bytes = dense_bytes(t.dims, t.dtype);
  const std::optional<int64_t> storage_bytes = dense_bytes(storage_dims, t.dtype);
  if (!bytes || !storage_bytes || *bytes > *storage_bytes) return false;
  if (*bytes == 0) return true;
  int64_t last = t.offset;
  for (size_t i = 0; i < t.dims.size(); ++i) {
    int64_t step = 0;
    if (t.strides[i] < 0 || __builtin_mul_overflow(t.dims[i] - 1, t.strides[i], &step) ||
        __builtin_add_overflow(last, step, &last)) {
      return false;
    }
  }
  return last < t.storage_size;
}

// The pickle machine: a stack of values, marks on it, and a memo of values to come back to.
class Machine {
 public:
  Machine(std::span<const std::byte> pickle, std::string_view source)
      : pickle_(pickle), source_(source) {}

  std::vector<TorchTensor> run() {
    do {
      opcode_at_ = at_;
      opcode_ = read<uint8_t>();
      execute();
    } while (opcode_ != kStop);
    return state_dict(pop());
  }

 private:
  template <typename... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    input_error("{}: byte {} of the pickle: {}", source_, opcode_at_,
                fmt::format(format, std::forward<Args>(args)...));
  }

  void execute() {
    switch (opcode_) {
      case kProto:
        return check_protocol(read<uint8_t>());
      case kFrame:
        return static_cast<void>(read<uint64_t>());
      case kStop:
        return;
      case kMark:
        return marks_.push_back(stack_.size());
      case kNone:
        return push(None{});
      case kNewTrue:
        return push(true);
      case kNewFalse:
        return push(false);
      case kBinInt:
        return push(int64_t{read<int32_t>()});
      case kBinInt1:
        return push(int64_t{read<uint8_t>()});
      case kBinInt2:
        return push(int64_t{read<uint16_t>()});
      case kLong1:
        return push(read_long(read<uint8_t>()));
      case kShortBinUnicode:
        return push(std::string(read_text(read<uint8_t>())));
      case kBinUnicode:
        return push(std::string(read_text(read<uint32_t>())));
      case kBinUnicode8:
        return push(std::string(read_text(read<uint64_t>())));
      case kEmptyTuple:
        return push(Tuple{});
      case kTuple:
        return push(Tuple{pop_to_mark()});
      case kTuple1:
        return push(Tuple{pop_many(1)});
      case kTuple2:
        return push(Tuple{pop_many(2)});
      case kTuple3:
        return push(Tuple{pop_many(3)});
      case kEmptyList:
        return push(List{});
      case kAppend:
        return append(pop_many(1));
      case kAppends:
        return append(pop_to_mark());
      case kEmptyDict:
        return push(Dict{});
      case kSetItem:
        return set_items(pop_many(2));
      case kSetItems:
        return set_items(pop_to_mark());
      case kBinPut:
        return put(read<uint8_t>());
      case kLongBinPut:
        return put(read<uint32_t>());
      case kMemoize:
        return put(static_cast<uint32_t>(memo_.size()));
      case kBinGet:
        return get(read<uint8_t>());
      case kLongBinGet:
        return get(read<uint32_t>());
      case kGlobal: {
        const std::string_view module = read_line();
        return push_global(module, read_line());
      }
      case kStackGlobal: {
        const std::vector<Id> names = pop_many(2);
        return push_global(as<std::string>(names[0], "a module's name"),
                           as<std::string>(names[1], "a global's name"));
      }
      case kBinPersId:
        return push(storage(as<Tuple>(pop(), "a persistent id")));
      case kReduce:
        return reduce();
      case kBuild:
        // Attributes of the dict, such as _metadata: of no interest.
        pop();
        return static_cast<void>(as<Dict>(top(), "an object with attributes"));
      default:
        fail("opcode 0x{:02x} ({}) is not one that a state dict needs, and is not executed",
             opcode_, name_of_foreign(opcode_));
    }
  }

  // Input.

  template <typename T>
  T read() {
    if (pickle_.size() - at_ < sizeof(T)) fail("the pickle ends too early");
    const T value = load_le<T>(pickle_, at_);
    at_ += sizeof(T);
    return value;
  }

  std::string_view read_text(uint64_t size) {
    if (pickle_.size() - at_ < size) fail("the pickle ends too early");
    const std::string_view text(reinterpret_cast<const char*>(pickle_.data()) + at_, size);
    at_ += size;
    return text;
  }

  std::string_view read_line() {
    const std::string_view rest(reinterpret_cast<const char*>(pickle_.data()) + at_,
                                pickle_.size() - at_);
    const size_t size = rest.find('\n');
    if (size == std::string_view::npos) fail("the pickle ends too early");
    at_ += size + 1;
    return rest.substr(0, size);
  }

  // A little-endian two's complement integer of any length.
  int64_t read_long(size_t size) {
    const std::string_view bytes = read_text(size);
    if (size > sizeof(int64_t)) fail("an integer of {} bytes is too large", size);
    uint64_t value = 0;
    for (size_t i = 0; i < size; ++i) {
      value |= static_cast<uint64_t>(static_cast<uint8_t>(bytes[i])) << (8 * i);
    }
    const size_t unused = 64 - 8 * size;
    return size == 0 ? 0 : static_cast<int64_t>(value << unused) >> unused;
  }

  void check_protocol(uint8_t version) const {
    if (version < 2 || version > 5) fail("pickle protocol {} is not supported", version);
  }

  // The stack.

  void push(Value value) {
    if (values_.size() >= kMaxValues) fail("the pickle has more than {} values", kMaxValues);
    stack_.push_back(static_cast<Id>(values_.size()));
    values_.push_back(std::move(value));
  }

  size_t available() const { return stack_.size() - (marks_.empty() ? 0 : marks_.back()); }

  std::vector<Id> pop_many(size_t count) {
    if (available() < count) fail("the stack is empty");
    std::vector<Id> items(stack_.end() - static_cast<ptrdiff_t>(count), stack_.end());
    stack_.resize(stack_.size() - count);
    return items;
  }

  std::vector<Id> pop_to_mark() {
    if (marks_.empty()) fail("there is no mark on the stack");
    std::vector<Id> items = pop_many(available());
    marks_.pop_back();
    return items;
  }

  Id pop() { return pop_many(1)[0]; }

  Id top() const {
    if (available() == 0) fail("the stack is empty");
    return stack_.back();
  }

  template <typename T>
  T& as(Id id, std::string_view what) {
    T* value = std::get_if<T>(&values_[id]);
    if (value == nullptr) fail("the type of {} is wrong", what);
    return *value;
  }

  // The memo.

  void put(uint32_t key) {
    if (memo_.size() >= kMaxValues) fail("the memo has more than {} values", kMaxValues);
    memo_[key] = top();
  }

  void get(uint32_t key) {
    const auto found = memo_.find(key);
    if (found == memo_.end()) fail("the memo has no value {}", key);
    stack_.push_back(found->second);
  }

  // Objects.

  void append(const std::vector<Id>& items) {
    std::vector<Id>& list = as<List>(top(), "what is appended to").items;
    list.insert(list.end(), items.begin(), items.end());
  }

  void set_items(const std::vector<Id>& items) {
    if (items.size() % 2 != 0) fail("a key has no value");
    Dict& dict = as<Dict>(top(), "what items are set in");
    for (size_t i = 0; i < items.size(); i += 2) dict.items.emplace_back(items[i], items[i + 1]);
  }

  void push_global(std::string_view module, std::string_view name) {
    std::optional<Value> value = global_named(module, name);
    if (!value) {
      constexpr size_t kLength = 100;
      fail("{:?} is not one of the globals that a state dict needs, and is not imported",
           fmt::format("{}.{}", module.substr(0, kLength), name.substr(0, kLength)));
    }
    push(std::move(*value));
  }

  void reduce() {
    const std::vector<Id> call = pop_many(2);
    const std::vector<Id> args = as<Tuple>(call[1], "a call's arguments").items;
    switch (as<Callable>(call[0], "what is called")) {
      case Callable::ordered_dict:
        if (!args.empty()) fail("OrderedDict with arguments is not supported");
        return push(Dict{});
      case Callable::rebuild_tensor:
        return push(rebuild_tensor(args));
      case Callable::rebuild_parameter:
        if (args.empty()) fail("_rebuild_parameter needs a tensor");
        return push(as<TorchTensor>(args[0], "the tensor of a parameter"));
    }
  }

  // ("storage", type, key, device, size)
  Storage storage(const Tuple& id) {
    if (id.items.size() != 5 || as<std::string>(id.items[0], "a persistent id") != "storage") {
      fail("a persistent id is no storage");
    }
    return {.dtype = as<StorageType>(id.items[1], "the type of a storage").dtype,
            .key = as<std::string>(id.items[2], "the key of a storage"),
            .size = as<int64_t>(id.items[4], "the size of a storage")};
  }

  // (storage, offset, dims, strides, requires_grad, hooks), and metadata that older versions lack
  TorchTensor rebuild_tensor(const std::vector<Id>& args) {
    if (args.size() != 6 && args.size() != 7) fail("a tensor with {} arguments", args.size());
    const Storage& store = as<Storage>(args[0], "the storage of a tensor");
    TorchTensor tensor{.name = {},
                       .storage = store.key,
                       .dtype = store.dtype,
                       .storage_size = store.size,
                       .offset = as<int64_t>(args[1], "the offset of a tensor"),
                       .dims = integers(args[2], "the shape of a tensor"),
                       .strides = integers(args[3], "the strides of a tensor")};
    if (!fits_storage(tensor)) {
      fail(
          "a tensor of shape ({}), strides ({}) and offset {} does not fit its storage of {} "
          "elements, repeats elements or has more than {} dims",
          fmt::join(tensor.dims, ", "), fmt::join(tensor.strides, ", "), tensor.offset,
          tensor.storage_size, kMaxRank);
    }
    return tensor;
  }

  std::vector<int64_t> integers(Id tuple, std::string_view what) {
    std::vector<int64_t> result;
    for (const Id item : as<Tuple>(tuple, what).items) result.push_back(as<int64_t>(item, what));
    return result;
  }

  std::vector<TorchTensor> state_dict(Id id) {
    std::vector<TorchTensor> tensors;
    std::set<std::string> names;
    if (!std::holds_alternative<Dict>(values_[id])) fail("what was saved is no state dict");
    for (const auto& [key, value] : std::get<Dict>(values_[id]).items) {
      const std::string& name = as<std::string>(key, "a key of the state dict");
      const TorchTensor* tensor = std::get_if<TorchTensor>(&values_[value]);
      if (tensor == nullptr) {
        fail("the entry {:?} is no tensor: save model.state_dict() and nothing else", name);
      }
      if (!names.insert(name).second) fail("there are two tensors {:?}", name);
      tensors.push_back(*tensor);
      tensors.back().name = name;
    }
    return tensors;
  }

  std::span<const std::byte> pickle_;
  std::string_view source_;
  size_t at_ = 0;
  size_t opcode_at_ = 0;
  uint8_t opcode_ = 0;
  std::vector<Value> values_;
  std::vector<Id> stack_;
  std::vector<size_t> marks_;
  std::unordered_map<uint32_t, Id> memo_;
};

}  // namespace

std::vector<TorchTensor> unpickle_state_dict(std::span<const std::byte> pickle,
                                             std::string_view source) {
  return Machine(pickle, source).run();
}

}  // namespace mamba3
