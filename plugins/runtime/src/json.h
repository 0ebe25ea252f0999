// Strict reading of JSON: every refusal names the place.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include <nlohmann/json_fwd.hpp> // the whole of it takes long to compile

#include "refusal.h"

namespace iq
{

using Json = nlohmann::json;

// A JSON value and the path to it. Its functions throw Refusal where the value is not as asked for.
class Node
{
public:
    Node(Json const& json, std::string where)
        : mJson(json)
        , mWhere(std::move(where))
    {
    }

    Node operator[](char const* key) const; // a member that must be there
    bool has(char const* key) const;
    bool isText() const noexcept;
    bool isList() const noexcept;
    bool isNull() const noexcept;
    std::string const& text() const;
    int64_t integer(int64_t low, int64_t high) const;
    bool boolean() const;
    void eachItem(std::function<void(Node const&)> const& visit) const;
    void eachMember(std::function<void(std::string const&, Node const&)> const& visit) const;
    [[noreturn]] void refuse(std::string const& why) const;
    Json const& json() const noexcept
    {
        return mJson;
    }
    std::string const& where() const noexcept
    {
        return mWhere;
    }

private:
    Json const& mJson;
    std::string mWhere;
};

constexpr int kDeepest = 64; // DEEPEST of iq_export/bundle/schema.py

class Document
{
public:
    // Throws Refusal, naming `where`, if `text` is not JSON, has an object with a key twice, or is
    // deeper than kDeepest levels.
    Document(std::string const& text, std::string const& where);
    ~Document();
    Document(Document const&) = delete;
    Document& operator=(Document const&) = delete;

    Node root() const
    {
        return {*mJson, mWhere};
    }

private:
    std::unique_ptr<Json> mJson;
    std::string mWhere;
};

} // namespace iq
