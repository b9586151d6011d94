// A cached model without Python: an archive of cachepass.export with weights inside, run by its timetable.
//
//     run ARCHIVE INPUTS SIGMAS GUIDANCE OUTPUT
//
// INPUTS is a folder with a file of raw numbers for every argument of the model. The latents are guidance batches,
// [uncond, cond]: their first half moves by Euler steps along the guided velocity, through the sigmas in the file SIGMAS;
// the timestep is 1000 times the sigma. OUTPUT gets the latents, as raw numbers.
//
// The schedule is the archive's: which program runs in which step, on which slots and with which weights of the
// forecast, is written out in its timetable (cachepass/ship/timetable.py), so there is none of it here.

#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

using torch::Tensor;
using Loader = torch::inductor::AOTIModelPackageLoader;

const std::string kTimetable = "extra/cachepass/timetable/0";
const std::string kTensors = "extra/cachepass/tensors/";

torch::Dtype dtype_of(const std::string& name) {
  static const std::map<std::string, torch::Dtype> known{
      {"float32", torch::kFloat32}, {"float64", torch::kFloat64}, {"float16", torch::kFloat16},
      {"bfloat16", torch::kBFloat16}, {"int64", torch::kInt64}, {"int32", torch::kInt32}, {"bool", torch::kBool}};
  return known.at(name);
}

// Numbers up to the next "|", "->" or the end of the line.
std::vector<int64_t> numbers_in(std::istringstream& line) {
  std::vector<int64_t> found;
  std::string word;
  while (line >> word && word != "|" && word != "->") found.push_back(std::stoll(word));
  return found;
}

struct Form {
  torch::Dtype dtype;
  std::vector<int64_t> shape, stride;

  static Form read(std::istringstream& line) {
    std::string dtype;
    line >> dtype;
    Form form{dtype_of(dtype), numbers_in(line), {}};
    form.stride = numbers_in(line);
    return form;
  }
  Tensor empty() const { return torch::empty_strided(shape, stride, dtype); }
};

struct Input {
  bool weight;
  std::string name;
  Form form;
};

struct Step {  // of a program: a call, a view or a copy
  std::string what, program;
  std::vector<int64_t> from, to, stride;  // of a view: [source, result, sizes...], {offset}, strides
};

struct Program {
  std::vector<Step> steps;
  std::vector<int64_t> results, adopting;
};

struct Turn {  // of the run: a program, and what it is given behind the model's inputs
  std::string program;
  std::vector<int64_t> slots;  // -1: numbers
  std::vector<Tensor> numbers;
};

struct Run {
  std::vector<Input> inputs;
  std::vector<Tensor> slots;
  std::map<std::string, Program> programs;
  std::vector<Turn> turns;
};

Turn read_turn(std::istringstream& line) {
  Turn turn;
  line >> turn.program;
  for (std::string kind; line >> kind;) {
    if (kind == "slot") {
      int64_t slot;
      line >> slot;
      turn.slots.push_back(slot);
      turn.numbers.emplace_back();
    } else {
      std::string dtype;
      int64_t count;
      line >> dtype >> count;
      std::vector<double> values(count);
      for (double& value : values) line >> value;
      turn.slots.push_back(-1);
      turn.numbers.push_back(torch::tensor(values, torch::kFloat64).to(dtype_of(dtype)));
    }
  }
  return turn;
}

Run read_timetable(const std::string& text) {
  Run run;
  Program* program = nullptr;
  std::istringstream lines(text);
  for (std::string whole; std::getline(lines, whole);) {
    std::istringstream line(whole);
    std::string what;
    line >> what;
    if (what == "input") {
      std::string number, kind, name;
      line >> number >> kind >> name;
      run.inputs.push_back({kind == "weight", name, Form::read(line)});
    } else if (what == "slot") {
      std::string number;
      line >> number;
      run.slots.push_back(Form::read(line).empty().zero_());
    } else if (what == "program") {
      std::string name;
      line >> name;
      program = &run.programs[name];
    } else if (what == "call") {
      Step step{what, "", {}, {}, {}};
      line >> step.program;
      step.from = numbers_in(line);
      step.to = numbers_in(line);
      program->steps.push_back(step);
    } else if (what == "view") {
      Step step{what, "", numbers_in(line), {}, {}};
      step.stride = numbers_in(line);
      step.to = numbers_in(line);
      program->steps.push_back(step);
    } else if (what == "copy") {
      program->steps.push_back({what, "", numbers_in(line), {}, {}});
    } else if (what == "results") {
      program->results = numbers_in(line);
    } else if (what == "adopting") {
      program->adopting = numbers_in(line);
    } else if (what == "step") {
      run.turns.push_back(read_turn(line));
    }
  }
  return run;
}

Tensor read_file(const std::string& path, const Form& form) {
  Tensor tensor = torch::empty(form.shape, form.dtype);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(static_cast<char*>(tensor.data_ptr()), tensor.nbytes())) throw std::runtime_error(path);
  return tensor;
}

class Model {
 public:
  explicit Model(const std::string& path) : reader_(path) {
    auto [data, size] = reader_.getRecord(kTimetable);
    run_ = read_timetable(std::string(static_cast<const char*>(data.get()), size));
    for (const auto& [name, program] : run_.programs)
      for (const Step& step : program.steps)
        if (step.what == "call" && !loaders_.count(step.program))
          loaders_[step.program] = std::make_unique<Loader>(path, step.program, true);
    for (const Input& input : run_.inputs) {
      values_.push_back(input.form.empty());
      if (!input.weight) continue;
      auto [bytes, count] = reader_.getRecord(kTensors + input.name);
      values_.back().copy_(torch::from_blob(bytes.get(), input.form.shape, input.form.dtype));
    }
  }

  const std::vector<Input>& inputs() const { return run_.inputs; }

  void give(const std::string& name, const Tensor& value) {
    for (size_t i = 0; i < run_.inputs.size(); ++i)
      if (!run_.inputs[i].weight && run_.inputs[i].name == name) values_[i].copy_(value);
  }

  // The next step of the run: what the model returns.
  std::vector<Tensor> step() {
    while (run_.turns.at(turn_).program == "once") play(run_.turns.at(turn_++));
    return play(run_.turns.at(turn_++));
  }

 private:
  std::vector<Tensor> play(const Turn& turn) {
    const Program& program = run_.programs.at(turn.program);
    std::map<int64_t, Tensor> values;
    std::map<int64_t, int64_t> slot_at;
    for (size_t i = 0; i < values_.size(); ++i) values[i] = values_[i];
    for (size_t i = 0; i < turn.slots.size(); ++i) {
      const int64_t at = values_.size() + i, slot = turn.slots[i];
      values[at] = slot < 0 ? turn.numbers[i] : run_.slots[slot];
      slot_at[at] = slot;
    }
    for (const Step& step : program.steps) {
      if (step.what == "copy") {
        values[step.from[1]].copy_(values[step.from[0]]);
      } else if (step.what == "view") {
        const Tensor& source = values[step.from[0]];
        const std::vector<int64_t> shape(step.from.begin() + 2, step.from.end());
        values[step.from[1]] = source.as_strided(shape, step.stride, source.storage_offset() + step.to[0]);
      } else {
        std::vector<Tensor> given;
        for (int64_t n : step.from) given.push_back(values[n]);
        auto made = loaders_.at(step.program)->run(given);
        for (size_t i = 0; i < step.to.size(); ++i) values[step.to[i]] = made[i];
      }
    }
    std::vector<Tensor> results;
    for (int64_t n : program.results) results.push_back(values[n]);
    const size_t own = results.size() - program.adopting.size();
    for (size_t i = 0; i < program.adopting.size(); ++i)
      run_.slots[slot_at.at(program.adopting[i])] = results[own + i];
    results.resize(own);
    return results;
  }

  caffe2::serialize::PyTorchStreamReader reader_;
  Run run_;
  std::map<std::string, std::unique_ptr<Loader>> loaders_;
  std::vector<Tensor> values_;
  size_t turn_ = 0;
};

int main(int argc, char** argv) {
  if (argc != 6) {
    std::cerr << "run ARCHIVE INPUTS SIGMAS GUIDANCE OUTPUT\n";
    return 2;
  }
  torch::InferenceMode inference;
  Model model(argv[1]);
  Tensor latents;
  Form timestep;
  for (const Input& input : model.inputs()) {
    if (input.weight) continue;
    if (input.name == "timestep") {
      timestep = input.form;
      continue;
    }
    Tensor value = read_file(std::string(argv[2]) + "/" + input.name, input.form);
    if (input.name == "hidden_states") latents = value.chunk(2)[0];
    model.give(input.name, value);
  }
  std::vector<double> sigmas;
  std::ifstream file(argv[3]);
  for (double sigma; file >> sigma;) sigmas.push_back(sigma);
  const double guidance = std::stod(argv[4]);
  for (size_t i = 0; i + 1 < sigmas.size(); ++i) {
    model.give("hidden_states", torch::cat({latents, latents}));
    model.give("timestep", torch::full(timestep.shape, 1000 * sigmas[i]).to(timestep.dtype));
    const auto halves = model.step().at(0).chunk(2);
    latents = latents + (sigmas[i + 1] - sigmas[i]) * (halves[0] + guidance * (halves[1] - halves[0]));
  }
  std::ofstream out(argv[5], std::ios::binary);
  latents = latents.contiguous();
  out.write(static_cast<const char*>(latents.data_ptr()), latents.nbytes());
  return out ? 0 : 1;
}
