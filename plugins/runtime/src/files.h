// Files of a bundle: opened inside its folder only, hashed as they are read.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include <unistd.h>

namespace iq
{

// Where files lie that an update of the bundle (iq_export/bundle/update.py) has not moved to their
// places yet: they count, and their places are looked at after it.
constexpr char const* kAhead = ".iq-export/update/";

class FileDescriptor
{
public:
    FileDescriptor() = default;
    explicit FileDescriptor(int fd) noexcept
        : mFd(fd)
    {
    }
    FileDescriptor(FileDescriptor&& other) noexcept
        : mFd(std::exchange(other.mFd, -1))
    {
    }
    FileDescriptor& operator=(FileDescriptor&& other) noexcept
    {
        std::swap(mFd, other.mFd);
        return *this;
    }
    ~FileDescriptor()
    {
        if (mFd >= 0)
        {
            ::close(mFd);
        }
    }
    int get() const noexcept
    {
        return mFd;
    }

private:
    int mFd{-1};
};

// `folder`, for openFile. Throws Refusal if it is none.
FileDescriptor openFolder(std::string const& folder);

// A regular file below `folder`, reached without following any link: the newer one while an update
// moves it to its place. If there is none, the result is empty (-1) and `found` says what is there
// instead.
FileDescriptor openFile(FileDescriptor const& folder, std::string const& name, std::string& found);

// Whether that is the newer one, which an update has not moved to its place yet.
bool liesAhead(FileDescriptor const& folder, std::string const& name);

uint64_t sizeOf(FileDescriptor const& file) noexcept;

// The SHA-256 in hexadecimal of what was read: all, or a little more than `limit` bytes if there is
// more. The bytes go to `content` if that is given. Throws Refusal where reading fails.
std::string hashFile(
    FileDescriptor const& file, std::string const& name, uint64_t limit, std::string* content);

} // namespace iq
