// Scores images by an exported model, by onnxruntime's C++ API: class, score, threshold, p-value and verdict of each.
//
//   g++ -std=c++17 -O2 -I INCLUDE onnx_score.cpp -L LIB -lonnxruntime -o onnx_score
//   ./onnx_score model.onnx a.ppm b.pgm ... > table.csv
//
// INCLUDE is the folder of onnxruntime_cxx_api.h. Images are binary PPM or PGM (P6, P5), of 8 or 16 bits, which take no
// library to read, in the size that the model takes: resize others before, as the sidecar says and onnx_score.py does
// (Lanczos, antialiased). The exit code is 1 where an image could not be scored.

#include <onnxruntime_cxx_api.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

// Returns where the value of a key begins in the text of the sidecar. It is JSON, where quotes within a text stand
// behind a backslash, so that no text looks like a key.
size_t value_of(const std::string& sidecar, const std::string& key) {
  const std::string quoted = "\"" + key + "\":";
  const size_t at = sidecar.find(quoted);
  if (at == std::string::npos) throw std::runtime_error("its sidecar has no " + key);
  return sidecar.find_first_not_of(" \n", at + quoted.size());
}

// Returns the 16 bits that stand in JSON as \uXXXX at a position, or 0.
uint32_t unit_at(const std::string& json, size_t at) {
  return json.compare(at, 2, "\\u") == 0 ? std::stoul(json.substr(at + 2, 4), nullptr, 16) : 0;
}

// Returns a text of JSON in UTF-8, and moves `at` from the quote before to the one behind it.
std::string text_at(const std::string& json, size_t& at) {
  std::string text;
  while (json.at(++at) != '"') {
    if (json[at] != '\\') {
      text += json[at];
    } else if (json.at(at + 1) != 'u') {
      const std::string letters = "bfnrt", meant = "\b\f\n\r\t";
      const size_t letter = letters.find(json[++at]);
      text += letter == std::string::npos ? json[at] : meant[letter];
    } else {
      uint32_t code = unit_at(json, at);
      at += 5;
      const uint32_t low = code >> 10 == 0xD800 >> 10 ? unit_at(json, at + 1) : 0;  // of a surrogate pair
      if (low >> 10 == 0xDC00 >> 10) {
        code = 0x10000 + ((code & 0x3FF) << 10 | (low & 0x3FF));
        at += 6;
      }
      const int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;  // bytes behind the first
      const std::array<uint32_t, 4> first{0, 0xC0, 0xE0, 0xF0};
      text += static_cast<char>(first[more] | code >> 6 * more);
      for (int i = more - 1; i >= 0; --i) text += static_cast<char>(0x80 | (code >> 6 * i & 0x3F));
    }
  }
  return text;
}

// Returns the names of the classes, by their number.
std::vector<std::string> class_names(const std::string& sidecar) {
  std::vector<std::string> names;
  std::string key;
  for (size_t at = value_of(sidecar, "groups"); sidecar.at(at) != ']'; ++at) {
    if (sidecar[at] != '"') continue;
    const std::string text = text_at(sidecar, at);
    const bool is_name = key == "name";  // the only key whose value is a text
    if (is_name) names.push_back(text);
    key = is_name ? "" : text;
  }
  return names;
}

// Returns the sidecar of a model, which is in its metadata, if this program can use the model.
std::string sidecar_of(const Ort::Session& session) {
  Ort::AllocatorWithDefaultOptions allocator;
  const auto text = session.GetModelMetadata().LookupCustomMetadataMapAllocated("hgad_fast", allocator);
  const std::string version = "hgad_fast export 1", sidecar = text ? text.get() : "";
  size_t at = text ? value_of(sidecar, "format") : 0;
  if (!text || text_at(sidecar, at) != version) {
    throw std::runtime_error("not written by hgad-fast export, or by another version: its sidecar is no '" + version +
                             "'");
  }
  std::set<std::string> missing{"class_id", "score", "threshold", "p_value", "is_anomalous"};
  for (size_t i = 0; i < session.GetOutputCount(); ++i) {
    missing.erase(session.GetOutputNameAllocated(i, allocator).get());
  }
  if (!missing.empty() || session.GetInputCount() != 1 ||
      session.GetInputNameAllocated(0, allocator).get() != std::string("image")) {
    throw std::runtime_error("for this program, export it without --inputs features, --class-input and --outputs");
  }
  return sidecar;
}

// Returns the next number of the header of a PPM, behind white space and comments.
int64_t header_number(std::istream& file) {
  while (file >> std::ws && file.peek() == '#') file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  int64_t number = 0;
  if (!(file >> number) || number < 1) throw std::runtime_error("damaged: its header lacks a number");
  return number;
}

// Returns a PPM or PGM as 3 x height x width values in [0, 1], red first, as hgad-fast reads it: of colours of 16 bits
// 8 count, and grey of 16 bits is divided by the white level.
std::vector<float> read(const std::string& path, int64_t height, int64_t width, int64_t white_level) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("no file that can be opened");
  std::array<char, 2> magic{};
  file.read(magic.data(), magic.size());
  if (magic[0] != 'P' || (magic[1] != '5' && magic[1] != '6')) throw std::runtime_error("no PPM or PGM (P6, P5)");
  const int64_t channels = magic[1] == '6' ? 3 : 1;
  const int64_t columns = header_number(file), rows = header_number(file), largest = header_number(file);
  if (largest > 65535) throw std::runtime_error("damaged: values above 65535");
  if (rows != height || columns != width) {
    const auto text = [](int64_t h, int64_t w) { return std::to_string(h) + "x" + std::to_string(w); };
    throw std::runtime_error("it is " + text(rows, columns) + " (height x width), and the model takes " +
                             text(height, width) + ": resize it as the sidecar says, or export with --size " +
                             text(rows, columns));
  }
  const int64_t pixels = rows * columns, bytes = largest > 255 ? 2 : 1;
  std::vector<unsigned char> content(pixels * channels * bytes);
  file.get();  // the one white space behind the header
  file.read(reinterpret_cast<char*>(content.data()), static_cast<std::streamsize>(content.size()));
  if (file.gcount() != static_cast<std::streamsize>(content.size())) throw std::runtime_error("truncated");

  const int64_t full = bytes == 2 && channels == 1 ? 65535 : 255;
  const float white = full == 255 ? 255.0f : static_cast<float>(white_level);
  std::vector<float> image(3 * pixels);
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = 0; c < 3; ++c) {
      const unsigned char* sample = &content[(i * channels + c % channels) * bytes];
      double value = bytes == 2 ? 256 * sample[0] + sample[1] : sample[0];
      if (value > largest) throw std::runtime_error("damaged: a value above its largest, " + std::to_string(largest));
      if (largest != full) value = std::nearbyint(value / static_cast<double>(largest) * static_cast<double>(full));
      image[c * pixels + i] = static_cast<float>(value) / white;
      if (!(image[c * pixels + i] <= 1.0f)) {
        throw std::runtime_error("16-bit values above the white level, " + std::to_string(white_level) +
                                 ": is this another camera?");
      }
    }
  }
  return image;
}

// Scores the images and returns how many could not be.
int score(const std::filesystem::path& model, int count, char** images) {
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "onnx_score");
  Ort::Session session(env, model.c_str(), Ort::SessionOptions{});
  const std::string sidecar = sidecar_of(session);
  const std::vector<std::string> names = class_names(sidecar);
  const int64_t white_level = std::stoll(sidecar.substr(value_of(sidecar, "white_level"), 20));
  const Ort::TypeInfo input = session.GetInputTypeInfo(0);
  std::vector<int64_t> shape = input.GetTensorTypeAndShapeInfo().GetShape();  // -1, 3, height, width
  shape[0] = 1;

  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const std::array<const char*, 1> inputs{"image"};
  const std::array<const char*, 5> outputs{"class_id", "score", "threshold", "p_value", "is_anomalous"};
  std::cout << "file,class_id,class,score,threshold,p_value,anomalous\n" << std::setprecision(9);
  int failed = 0;
  for (int i = 0; i < count; ++i) {
    try {
      std::vector<float> image = read(images[i], shape[2], shape[3], white_level);
      const Ort::Value tensor =
          Ort::Value::CreateTensor<float>(memory, image.data(), image.size(), shape.data(), shape.size());
      const auto values = session.Run(Ort::RunOptions{}, inputs.data(), &tensor, 1, outputs.data(), outputs.size());
      const int64_t class_id = *values[0].GetTensorData<int64_t>();
      const std::string& name = names.at(class_id);
      if (!std::isfinite(*values[1].GetTensorData<float>())) {
        throw std::runtime_error("it has no score: its features overflow");
      }
      std::cout << std::quoted(images[i], '"', '"') << ',' << class_id << ',' << std::quoted(name, '"', '"');
      for (size_t output = 1; output < 4; ++output) {
        const float figure = *values[output].GetTensorData<float>();
        std::cout << ',';
        if (!std::isnan(figure)) std::cout << figure;  // a class without calibration images has no threshold
      }
      const bool judged = !std::isnan(*values[3].GetTensorData<float>());
      std::cout << ',' << (!judged ? "" : *values[4].GetTensorData<bool>() ? "True" : "False") << std::endl;
    } catch (const std::exception& error) {
      std::cerr << images[i] << ": " << error.what() << std::endl;
      ++failed;
    }
  }
  return failed;
}

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: onnx_score model.onnx IMAGE.ppm..." << std::endl;
    return 2;
  }
  try {
    const int failed = score(argv[1], argc - 2, argv + 2);
    if (failed) std::cerr << failed << " of " << argc - 2 << " images could not be scored" << std::endl;
    return failed ? 1 : 0;
  } catch (const std::exception& error) {
    std::cerr << argv[1] << ": " << error.what() << std::endl;
    return 1;
  }
}
