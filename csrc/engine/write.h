// Writing safetensors files (format: safetensors.h), completely or not at all.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "safetensors.h"

namespace bkcore::engine {

// A file under a temporary name in the same folder, which gets its own name when it is complete.
class NewFile {
 public:
  explicit NewFile(const std::string &path) : path_(path) {
    static std::atomic<unsigned> count{0};
    const std::string folder = path.substr(0, path.rfind('/') + 1);
    const auto open = [&] {
      temporary_ = folder + ".saving-" + std::to_string(::getpid()) + "-" +
                   std::to_string(count.fetch_add(1));
      file_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      return file_ >= 0;
    };
    // A process of the same number may have left files when it was killed.
    for (int tries = 0; !open(); ++tries)
      if (errno != EEXIST || tries == 1000) fail();
  }
  NewFile(const NewFile &) = delete;
  NewFile &operator=(const NewFile &) = delete;
  ~NewFile() {
    if (file_ >= 0) ::close(file_);
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
  }

  void write(const void *data, std::size_t size) {
    const char *next = static_cast<const char *>(data);
    while (size > 0) {
      const ::ssize_t written = ::write(file_, next, size);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail();
      next += written, size -= static_cast<std::size_t>(written);
    }
  }

  // What is on the disk must be complete before the name is, even if the power fails.
  void finish() {
    if (::fsync(file_) != 0) fail();
    if (::close(std::exchange(file_, -1)) != 0) fail();
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail();
    temporary_.clear();
  }

 private:
  [[noreturn]] void fail() const {
    throw CheckpointError(shown_path(path_) + " cannot be written: " + std::strerror(errno));
  }

  std::string path_, temporary_;
  int file_ = -1;
};

// Writes tensors, contiguous in memory. Names may have letters, digits, points and underscores.
inline void write_safetensors(const std::string &path,
                              const std::vector<std::pair<std::string, Tensor>> &tensors) {
  std::string header;
  std::vector<std::uint64_t> sizes;
  std::uint64_t end = 0;
  for (const auto &[name, tensor] : tensors) {
    const Kind &kind = kind_of(tensor.dtype);
    std::string shape;
    std::uint64_t size = kind.bytes;
    for (const std::int64_t n : tensor.shape) {
      shape += (shape.empty() ? "" : ",") + std::to_string(n);
      size *= static_cast<std::uint64_t>(n);
    }
    header += (header.empty() ? "{\"" : ",\"") + name + "\":{\"dtype\":\"" + kind.name +
              "\",\"shape\":[" + shape + "],\"data_offsets\":[" + std::to_string(end) + "," +
              std::to_string(end + size) + "]}";
    sizes.push_back(size);
    end += size;
  }
  header += "}";
  header.append((8 - header.size() % 8) % 8, ' ');  // so that the tensors are aligned
  const std::uint64_t length = header.size();
  NewFile file(path);
  file.write(&length, sizeof length);
  file.write(header.data(), header.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) file.write(tensors[i].second.data, sizes[i]);
  file.finish();
}

}  // namespace bkcore::engine
