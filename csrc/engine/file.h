// Files of a checkpoint: mapped into memory and never written.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "error.h"

namespace bkcore::engine {

// A regular file, mapped for reading. Another process that shortens it ends this one with SIGBUS,
// as with every mapped file; `save_pretrained` replaces files and never shortens them.
class MappedFile {
 public:
  // At most `most` bytes.
  explicit MappedFile(const std::string &path, std::size_t most = SIZE_MAX) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) fail(path);
    struct stat found{};
    const bool known = ::fstat(file, &found) == 0;
    if (known && S_ISREG(found.st_mode)) {
      size_ = static_cast<std::size_t>(found.st_size);
      if (size_ > 0 && size_ <= most) {
        data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
#if defined(MADV_HUGEPAGE)  // advice, which may be refused
        if (data_ != MAP_FAILED) ::madvise(data_, size_, MADV_HUGEPAGE);
#endif
      }
    }
    const int error = errno;
    ::close(file);
    if (!known || data_ == MAP_FAILED) {
      data_ = nullptr;
      errno = error;
      fail(path);
    }
    if (!S_ISREG(found.st_mode)) throw CheckpointError(shown_path(path) + " is not a regular file");
    if (size_ > most)
      throw CheckpointError(shown_path(path) + " has " + std::to_string(size_) +
                            " bytes, more than " + std::to_string(most));
  }
  MappedFile(const MappedFile &) = delete;
  MappedFile &operator=(const MappedFile &) = delete;
  ~MappedFile() {
    if (data_) ::munmap(data_, size_);
  }

  const std::byte *data() const { return static_cast<const std::byte *>(data_); }
  std::size_t size() const { return size_; }
  std::string_view text() const { return {static_cast<const char *>(data_), size_}; }

 private:
  [[noreturn]] static void fail(const std::string &path) {
    throw CheckpointError(shown_path(path) + " cannot be read: " + std::strerror(errno));
  }

  void *data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace bkcore::engine
