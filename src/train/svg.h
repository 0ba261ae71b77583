#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mamba3 {

// A picture of lines, bars and words, written as SVG. Coordinates are pixels from the top left. Its
// ground is white, so that it reads the same on a light and on a dark page.
class Svg {
 public:
  enum class Anchor : uint8_t { start, middle, end };  // which part of a text is at its place

  static constexpr std::string_view kInk = "#1f2328", kGrid = "#dddddd";

  Svg(double width, double height);

  void rectangle(double x, double y, double width, double height, std::string_view colour);
  void line(double x1, double y1, double x2, double y2, std::string_view colour = kGrid);
  void path(const std::vector<std::pair<double, double>>& points, std::string_view colour,
            bool dashed = false);
  void circle(double x, double y, double radius, std::string_view colour);
  // `y` is the base line. The characters of XML are escaped.
  void text(double x, double y, std::string_view words, Anchor anchor = Anchor::start,
            std::string_view colour = kInk, bool bold = false);

  std::string finish() const;  // the whole file

 private:
  std::string body_;
};

}  // namespace mamba3
